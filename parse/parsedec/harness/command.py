"""`parsedec-eval`: the command line of the Language Model Evaluation Harness, with this project's model registered.

parsedec-eval --model_args target=HUB_ID,draft=HUB_ID,inner=draft_model --tasks gsm8k --apply_chat_template
parsedec-eval --model_args config=FILE.yaml runtime.device=cpu --tasks gsm8k --limit 20 --output_path DIR

`--model parsedec` is the default; every other option is the harness's, and `parsedec-eval run --help` lists them.
With `--output_path`, a record of our own (what was drafted, kept and judged, how fast) is written beside its results.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from parsedec.errors import ConfigError, ParsedecError
from parsedec.experiment.cli import INTERRUPTED, USAGE, explain, stderr
from parsedec.experiment.nodes import conf_folder
from parsedec.tasks.base import require_extra

CHOOSES_A_MODEL = ("--model", "-M", "--config", "-C")


def main() -> None:
    """The console script. Exit codes: 0, 2 for errors that the user can correct, 130 after Ctrl-C."""
    sys.argv[1:] = with_model(sys.argv[1:])
    try:
        require_extra("lm_eval", "parsedec-eval")
        _run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (HydraException, OmegaConfBaseException, ParsedecError) as error:
        stderr.print(f"error: {explain(error, conf_folder())}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(USAGE)


def with_model(arguments: list[str]) -> list[str]:
    """The harness's arguments, with our model added if they run something and name no model."""
    if not arguments or arguments[0] in ("-h", "--help", "ls", "validate"):
        return arguments
    command, rest = (["run"], arguments[1:]) if arguments[0] == "run" else (["run"], arguments)
    if not rest or "--help" in rest or "-h" in rest:
        return [*command, *rest]
    named = any(argument.split("=")[0] in CHOOSES_A_MODEL for argument in rest)
    return [*command, *([] if named else ["--model", "parsedec"]), *rest]


def _run() -> None:
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from parsedec.harness import model  # registers it

    setup_logging()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if getattr(arguments, "model", None) == model.NAME and getattr(arguments, "output_path", None):
        arguments.model_args = _with_record(arguments.model_args, Path(arguments.output_path))
    harness.execute(arguments)


def _with_record(model_args: Any, output: Path) -> dict[str, Any]:
    """The model's arguments, with a name for it and a new file for its record in the folder of the results.

    Raises ConfigError for arguments without keys.
    """
    given = dict(model_args or {})
    if not all(isinstance(key, str) for key in given):
        raise ConfigError(f"--model_args {model_args!r} are not of the form key=value.")
    folder = output.parent if output.suffix == ".json" else output
    name = given.get("target") or Path(str(given.get("config") or "parsedec")).stem
    record = folder / f"parsedec_{datetime.now():%Y-%m-%dT%H-%M-%S.%f}.json"
    return {"model": name, "record": str(record), **given}
