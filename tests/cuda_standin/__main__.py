"""`python -m cuda_standin SCRIPT ARGUMENTS`: a script, on the stand-in."""

import runpy
import sys

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
