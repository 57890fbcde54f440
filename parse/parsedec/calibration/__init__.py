"""Calibration: thresholds that keep a stated goal, fitted on labelled drafts and checked on held-out ones.

sources    problems and their labels: a task's checker, labelled steps, or final answers only
samples    one draft, its cuts, the judge's scores, what is known to be right
scoring    a problem becomes a sample: draft and judge, as the engine does it
decisions  what every pair of thresholds keeps of a sample
risk       the statistics: exact bounds, fixed-sequence testing, conformal risk control
outcomes   the target goes on from kept prefixes, where only final answers are known
figures    how well the judge separates, where it errs, what every threshold costs
fitting    the steps above in their order; job: saving, resuming; report: table, picture, YAML
"""
