"""Reports people look at: records become one self-contained HTML page, and SVG, PNG and CSV files.

figure    one picture: numbers, a reading guide, and how they are drawn; its files
speed     pictures of records with arms: run.py, compare.py, replay.py, and folders of a sweep
judged    pictures of judges: calibration, judges side by side, evaluations of training
costs     pictures of work: training, overhead, floors
sections  a record becomes a section: what it says in words, tables and pictures
page      sections become a page (`report.html.j2`) and its files
"""
