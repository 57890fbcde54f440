"""Running configurations over tasks: building from YAML, arms alternating in one process, records, the command line."""
