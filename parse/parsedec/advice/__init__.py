"""Advice on a pair of models: what PARSE (arXiv 2605.04263) would do for it on given prompts, before it is set up.

trial.py        what is measured on a problem
measuring.py    measuring it: each draft once, each judge pass once per way of cutting
prediction.py   what arms would take and keep, from that
verdict.py      which is best, whether it helps, and what limits it
job.py          the run: measuring, rehearsing loops, the check on further problems
report.py       tables, advice.md and the configuration
"""
