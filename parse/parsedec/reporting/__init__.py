"""Reports people look at: records become one self-contained HTML page, and SVG, PNG and CSV files.

figure    one picture: its numbers, a reading guide, how they are drawn, and the files it becomes
curves    pictures that several kinds of records share
speed     pictures of records with arms: run.py, compare.py, replay.py, and folders of a sweep
judged    pictures of judges: calibration, judges side by side, evaluations of training
costs     pictures of work: training, overhead, floors
sections  turns a record into a section: words, tables and pictures
page      turns sections into a page (`report.html.j2`) and its files
documents fills Markdown documents with figures from records
"""
