"""Inner speculators, one file each; importing this package imports none of them.

Each class follows `parsedec.inner.InnerSpeculator` and is chosen by `conf/inner/NAME.yaml`.
"""
