"""Advice on a pair of models: what PARSE (arXiv 2605.04263) would gain on given prompts, before it is set up.

trial.py        what is measured on a problem
measuring.py    measuring it: each draft once, each judge pass once per way of cutting
prediction.py   what every arm would cost and keep, computed from these measurements
verdict.py      which arm is best, whether PARSE helps, and what limits it
job.py          the run: measuring, rehearsing the loops, checking on further problems
report.py       tables, advice.md and the configuration
"""
