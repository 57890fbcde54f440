"""A model card from a recipe's record: what the model is, how it was made, how well it does. Every figure is measured.

python -m parsedec.training.card DIR     DIR is a recipe's output; writes DIR/model/README.md

The head of the card is what model hubs read (YAML between two lines of dashes).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from parsedec.errors import ParsedecError
from parsedec.experiment.record import read_record, write_text
from parsedec.training.checksums import sha256

HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [parsedec, speculative-decoding]
---"""
SHAPE = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "tokens of the vocabulary": "vocab_size",
    "longest request in tokens": "max_position_embeddings",
}
LIMITS = """It knows this task, in these wordings, and nothing else. It is a wind tunnel for decoders, not a claim about
large models."""


def write_card(output: Path) -> Path:
    """Write the card of the finished run in `output` beside its model; returns its path.

    Raises ParsedecError if `output` holds no finished run.
    """
    record, folder = read_record(output / "record.json"), output / "model"
    weights = sorted(folder.glob("*.safetensors"))
    if record["status"] != "finished" or "evaluation" not in record or not weights:
        raise ParsedecError(
            f"{output} holds no finished training of a model (status {record['status']!r}, {len(weights)} files of "
            "weights); expected record.json with an evaluation and model/*.safetensors. Finish the run first "
            f"(resume=true output={output})."
        )
    return write_text(render(record, folder), folder / "README.md")


def render(record: dict[str, Any], folder: Path) -> str:
    """The card as Markdown, from a record and the folder of the exported model."""
    parts = [HEAD, f"# {record['title']}", shape(folder), origin(record), *figures(record), f"## Limits\n\n{LIMITS}"]
    return "\n\n".join([*parts, "## Files", files(folder)]) + "\n"


def shape(folder: Path) -> str:
    """Architecture and size, read from the files themselves."""
    config = json.loads((folder / "config.json").read_text())
    parameters, dtypes = 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - `tensors` is no dictionary and cannot be iterated
                part = tensors.get_slice(name)
                parameters += prod(part.get_shape())
                dtypes.add(str(part.get_dtype()))
    said = [("architecture", ", ".join(config.get("architectures", ["a head"])))]
    said += [(name, config[key]) for name, key in SHAPE.items() if key in config]  # a head's config has fewer keys
    return table(("", ""), [*said, ("parameters", f"{parameters:,} ({', '.join(sorted(dtypes))})")])


def origin(record: dict[str, Any]) -> str:
    """A table of what the model was trained from, on and with."""
    config, made = record["config"], record["provenance"]
    recipe, changed = config["recipe"], " with uncommitted changes" if made["git_dirty"] else ""
    # left out: where files were written does not concern the model
    words = [word for word in shlex.split(made["command"]) if not word.startswith(("output=", "resume="))]
    rows: list[tuple[str, object]] = [
        ("command", f"`python experiments/{shlex.join(words)}`"),
        ("target it drafts for", recipe["target"])
        if "target" in recipe
        else ("begun from", recipe["init"] or "nothing"),
        ("task", settings(recipe["task"])),
        ("updates", recipe["optimisation"]["steps"]),
        ("seed", config["seed"]),
        ("commit", f"{made['git_sha'] or 'unknown'}{changed}"),
        ("machine", made["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)),
    ]
    if record["resumed_from"]:
        rows.append(("resumed", f"yes; begun at {record['resumed_from']['started_at']}"))
    return "## How it came about\n\n" + table(("", ""), rows)


def figures(record: dict[str, Any]) -> Iterator[str]:
    """Accuracy on problems it was not trained on and, for a judge, what every threshold keeps and costs (for a head,
    tau instead)."""
    found, task = record["evaluation"], record["config"]["recipe"]["evaluation"]["task"]
    yield f"## Figures\n\n{found['problems']} problems of {settings(task)}; greedy; intervals are 95 %."
    if "tau" in found:
        low, high = found["tau_interval"]
        yield (
            f"Tokens per target call (tau, the call's own token included): {found['tau']:.2f} [{low:.2f}, {high:.2f}] "
            f"over {found['target_calls']} calls."
        )
        return
    if "thresholds" not in found:
        yield f"Accuracy: {accuracy(found['accuracy'])}."
        return
    yield (
        f"Accuracy: {accuracy(found['target_accuracy'])}; of the draft model whose answers it judges: "
        f"{accuracy(found['draft_accuracy'])}. Area under the ROC curve of its verdicts on {found['probes']} prefixes: "
        + ("not defined." if found["auc"] is None else f"{found['auc']:.3f}.")
    )
    rows = [
        (
            f"{row['threshold']:g}",
            f"{row['kept_tokens'] / max(1, row['drafted_tokens']):.0%}",
            row["accepted_whole"],
            row["accepted_whole_wrong"],
            accuracy(row["accuracy"]),
            f"{where['exact'] / max(1, where['wrong_drafts']):.1%}",
            f"{where['never_later'] / max(1, where['wrong_drafts']):.1%}",
        )
        for row, where in zip(found["thresholds"], found["localisation"], strict=True)
    ]
    names = ("threshold", "draft tokens kept", "drafts kept whole", "of these wrong", "accuracy of PARSE")
    yield table((*names, "first wrong line found exactly", "never later"), rows)
    yield (
        f"The last two columns are about the {found['localisation'][0]['wrong_drafts']} drafts that are wrong. Token "
        f"by token, draft and target agree on {found['shared_prefix_tokens'] / max(1, found['draft_tokens']):.1%} of "
        "the drafted tokens before they first differ."
    )
    card = record["judge_card"]
    yield (
        f"Its judge is asked `{card['question']}` and answers {' or '.join(f'`{label}`' for label in card['labels'])}. "
        f"Calibrated thresholds: {card['threshold']:g} for prefixes, {card['full_threshold']:g} for complete drafts "
        "(`judge.json`), chosen on problems of the calibration split."
    )


def files(folder: Path) -> str:
    """A table of the sha256 of every file beside the card."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    return table(("file", "sha256"), [(path.name, f"`{sha256(path)}`") for path in paths])


def settings(task: dict[str, Any]) -> str:
    """A task's settings as in its YAML, on one line."""
    rest = ", ".join(f"{key}={value}" for key, value in task.items() if key != "_target_")
    return f"`{task['_target_'].rpartition('.')[2]}` ({rest})"


def accuracy(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['share']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m parsedec.training.card DIR     (DIR: output of a finished recipe)")
    try:
        print(write_card(Path(sys.argv[1])))
    except ParsedecError as error:
        sys.exit(f"error: {error}")
