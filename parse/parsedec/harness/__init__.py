"""PARSE as a model of the Language Model Evaluation Harness (EleutherAI's lm_eval): `parsedec-eval`, and `ParsedecLM`.

The harness does not look for models in other packages, so `parsedec-eval` is the harness's own command with our model
registered.
"""
