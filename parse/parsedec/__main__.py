"""The command `parsedec`, also as `python -m parsedec`: its first word says which."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

COMMANDS = {"serve": ("parsedec.serve.command", "an OpenAI-compatible server over an engine")}
NEEDS = {"serve": ("server", ("fastapi", "uvicorn", "prometheus_client"))}  # the extra, and what it brings
USAGE = 2


def main() -> None:
    """The console script: exit code 0, 2 for what the user can mend."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    listed = "\n".join(f"  parsedec {command}  {told}" for command, (_, told) in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"{listed}\n\nparsedec COMMAND --help lists all groups and settings.")
        return
    if name not in COMMANDS:
        sys.exit(_fail(f"there is no command '{name}'; expected one of:\n{listed}"))
    extra, packages = NEEDS[name]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        sys.exit(_fail(f"parsedec {name} needs {missing[0]}; install it with pip install 'parsedec[{extra}]'."))
    del sys.argv[1]
    import_module(COMMANDS[name][0]).run()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    main()
