"""Calibration: fit thresholds that keep a stated goal on labelled drafts, and check them on held-out ones.

sources    problems and their labels: a task's checker, labelled steps, or final answers only
samples    one draft, its cuts, the judge's scores, and what is known to be right
scoring    turns a problem into a sample: draft and judge, as the engine does
decisions  what every pair of thresholds keeps of a sample
risk       the statistics: exact bounds, fixed-sequence testing, conformal risk control
outcomes   where only final answers are known: lets the target go on from kept prefixes
figures    how well the judge separates, where it errs, what every threshold costs
fitting    runs these steps in order
job        runs a calibration from configuration to record, with saving and resuming
report     table and YAML; picture: the PNG
"""
