"""PARSE as a model of the Language Model Evaluation Harness (EleutherAI's lm_eval): `parsedec-eval`, and `ParsedecLM`.

The harness finds no models in other packages by itself, so the command is the harness's own with ours registered.
"""
