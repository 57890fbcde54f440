"""The tables of a record, for the terminal and as Markdown: its arms, what they cost, what was to be expected of them,
and how deep their guesses were accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from parsedec.experiment.analysis import predict, rows_per_tree, token_ceiling, work
from parsedec.experiment.intervals import FEWEST, with_interval
from parsedec.experiment.record import command_line
from parsedec.experiment.summary import batch_of

DEEPEST = 8  # levels shown; a record holds all of them
OFFERED = 0.95  # the share of trees that reached a level is shown where it is below this

Column = tuple[str, Callable[[dict[str, Any], dict[str, Any] | None], str]]


def _accuracy(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    if summary["accuracy"] is None:
        return "-"
    low, high = summary["accuracy_interval"]
    return f"{100 * summary['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _share(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    return "-" if summary["kept_share"] is None else f"{100 * summary['kept_share']:.1f} %"


def _tau(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    tau = summary.get("tau")  # records made before it was counted have none
    return "-" if tau is None else f"{tau:.2f}"


def _ratio(name: str) -> Callable[[dict[str, Any], dict[str, Any] | None], str]:
    def cell(_: dict[str, Any], row: dict[str, Any] | None) -> str:
        if row is None or row[name] is None:
            return "-"
        return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"])

    return cell


def _p_value(_: dict[str, Any], row: dict[str, Any] | None) -> str:
    return (
        "-" if row is None or row["mcnemar_p"] is None else f"{row['mcnemar_p']:.2g} (+{row['better']} -{row['worse']})"
    )


def _quantiles(name: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    def cell(arm: dict[str, Any], _: dict[str, Any]) -> str:
        taken = [arm["summary"][f"{name}_p{q}"] for q in (50, 95, 99)]
        return "-" if None in taken else " / ".join(f"{seconds:.3g}" for seconds in taken)

    return cell


def _per_request(key: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    """GFLOP per answered request."""

    def cell(arm: dict[str, Any], _: dict[str, Any]) -> str:
        answered = arm["summary"]["requests"] - arm["summary"]["errors"]
        total = work(arm)[key]
        return f"{total / answered / 1e9:.3g}" if total and answered else "-"

    return cell


def _device_seconds(arm: dict[str, Any], _: dict[str, Any]) -> str:
    done = work(arm)
    if done["device_s"] is None:
        return "-"
    return f"{done['device_s']:.4g} {'CPU' if done['cpu'] else 'GPU'} s"


def _measured(arm: dict[str, Any], record: dict[str, Any]) -> str:
    row = next((row for row in record.get("comparison", []) if row["arm"] == arm["name"]), None)
    return _ratio("time_ratio")(arm["summary"], row)


def _predicted(key: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    def cell(arm: dict[str, Any], record: dict[str, Any]) -> str:
        said = predict(record, arm)
        return "-" if said is None else f"{said[key]:.2f}"

    return cell


def _kept_per_pass(arm: dict[str, Any], _: dict[str, Any]) -> str:
    summary = arm["summary"]
    return f"{summary['kept_draft_tokens'] / summary['judge_passes']:.2f}" if summary["judge_passes"] else "-"


def _token_ceiling(arm: dict[str, Any], record: dict[str, Any]) -> str:
    entropy, per_tree = record.get("entropy"), rows_per_tree(arm["summary"])
    if not entropy or per_tree is None or arm["summary"]["tau"] is None:
        return "-"
    ceiling = token_ceiling(entropy, per_tree)
    return "-" if ceiling is None else f"{ceiling:.3g} (P = {per_tree:.2g})"


Section = tuple[tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]], ...]

WORK: Section = (
    ("first token p50 / p95 / p99, s", _quantiles("first_token_s")),
    ("latency p50 / p95 / p99, s", _quantiles("latency_s")),
    ("target GFLOP", _per_request("target_flops")),
    ("draft GFLOP", _per_request("draft_flops")),
    ("device time", _device_seconds),
)
WORK_CAPTION = (
    "n = {n}. {batched}GFLOP per answered request: 2 x parameters x rows and attention, rows counted, from the models' "
    "sizes; an inner speculator's head or model is not among them. Device time: wall-clock times devices, all "
    "requests. Neither is known of models on servers."
)
BATCHED = (
    "Latency is the time that passed for a request among the {batch} answered at a time, not its share of their "
    "seconds, which is all that is known where - stands. "
)
ANALYSIS: Section = (
    ("speed-up in time", _measured),
    ("cost model", _predicted("speedup")),
    ("ceiling", _predicted("ceiling")),
    ("tokens kept per judge pass", _kept_per_pass),
    ("tau", lambda arm, _: _tau(arm["summary"], None)),
    ("token-level ceiling", _token_ceiling),
)
ANALYSIS_CAPTION = (
    "n = {n}. Cost model: prefill, drafted tokens and tokens written by the target at the pace at which draft model "
    "and inner level decode alone in this run, and the judge's passes as they were; ceiling: the draft model's pace "
    "over the target's, every draft kept and judged for nothing. Token-level ceiling (arXiv 2512.11718): most guesses "
    "per call that a lossless speculator with P rows per call gets right on average, but for a constant; {entropy}"
)


COLUMNS: tuple[Column, ...] = (
    ("accuracy", _accuracy),
    ("new tokens", lambda s, _: str(s["new_tokens"])),
    ("target calls", lambda s, _: str(s["target_calls"])),
    ("tau", _tau),
    ("kept share", _share),
    ("drafts kept whole", lambda s, _: str(s["accepted_whole"])),
    ("rounds", lambda s, _: str(s["rounds"])),
    ("errors", lambda s, _: str(s["errors"])),
    ("tok/s", lambda s, _: "-" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:.1f}"),
    ("speed-up in tok/s", _ratio("speedup")),
    ("in time", _ratio("time_ratio")),
    ("McNemar p", _p_value),
)


def columns(record: dict[str, Any]) -> tuple[Column, ...]:
    """A run by itself is compared with nothing; tau is shown if some arm guesses tokens."""
    compared = record.get("comparison")
    tested = compared and all("mcnemar_p" in row for row in compared)  # records made before it was taken have none
    shown = COLUMNS[: None if tested else -1 if compared else -3]
    guesses = any(arm["summary"].get("tau") is not None for arm in record["arms"])
    return tuple(column for column in shown if guesses or column[1] is not _tau)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells per arm, its name first."""
    against = {row["arm"]: row for row in record.get("comparison", [])}
    return [
        [arm["name"], *(render(arm["summary"], against.get(arm["name"])) for _, render in columns(record))]
        for arm in record["arms"]
    ]


def depth_rows(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells per arm that guesses tokens: its name, and for every depth the share of its verified trees
    accepted that far - of the share that reached it, where that is noticeably less than all."""
    guessing = [arm for arm in record["arms"] if arm["summary"].get("tau") is not None]
    deepest = min(DEEPEST, max((len(arm["summary"]["offered_by_depth"]) for arm in guessing), default=0))
    return [[arm["name"], *(_accepted(arm["summary"], depth) for depth in range(deepest))] for arm in guessing]


def _accepted(summary: dict[str, Any], depth: int) -> str:
    trees, reached = summary["inner_steps"], summary["offered_by_depth"]
    if depth >= len(reached):
        return "-"
    accepted, offered = summary["accepted_by_depth"][depth] / trees, reached[depth] / trees
    return f"{accepted:.2f}" + (f" of {offered:.2f}" if offered < OFFERED else "")


DEPTH_CAPTION = (
    "Share of the verified trees that were accepted to this depth or deeper; of: the share that reached it, where "
    f"below {OFFERED}. tau: tokens per verified tree, the target's own included."
)


def caption(record: dict[str, Any]) -> str:
    """Tier, machine, versions, commit, seed and counts: what a reader needs to weigh the figures."""
    n, config = record["arms"][0]["summary"]["requests"], record["config"]
    said = f"n = {n}, seed {config['seed']}"
    if seeds := config.get("seeds"):
        said = f"n = {record['arms'][0]['summary']['problems']} problems, seeds {', '.join(map(str, seeds))}"
    batch = config.get("batch", 1)
    shared = f"Answered {batch} at a time; seconds are the requests' shares. " if batch > 1 else ""
    return (
        f"Tier: {tier(record)}. {said}, at most {config['max_new_tokens']} "
        "new tokens; 95 % intervals (Wilson; of speed-ups Student's, paired, of the logarithm with the jackknife's "
        f"error, from {FEWEST} problems on). In time: the baseline's seconds over the arm's for the same requests. "
        f"{shared}{origin(record)}"
    )


def origin(record: dict[str, Any]) -> str:
    """Machine, versions and commit of a record."""
    made = record["provenance"]
    sha = (made["git_sha"] or "no commit")[:10] + (" with uncommitted changes" if made["git_dirty"] else "")
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "transformers"))
    return f"{made['device']}, {versions}, commit {sha}."


def tier(record: dict[str, Any]) -> str:
    """Which kind of evidence this is; the kinds are never mixed in one table."""
    if (record["config"].get("engine") or {}).get("target"):
        return "models on servers"
    source = str(record["config"]["target"]["source"])
    kinds = {"zoo:": "zoo", "replay:": "replay (random weights, scripted decisions: speed and nothing else)"}
    return next((kind for prefix, kind in kinds.items() if source.startswith(prefix)), "real checkpoints")


def sections(record: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, heads, cells, note) of latency and work, and where arms are compared, of the analysis; none for records
    made before the models' sizes were stored."""
    arms = [arm for arm in record["arms"] if "models" in arm]
    if not arms:
        return []
    n, entropy = arms[0]["summary"]["requests"], record.get("entropy")
    source = (
        f"the target's entropy at temperature {entropy['temperature']:g} is "
        f"{entropy['nats'] / entropy['tokens']:.2g} nats over {entropy['tokens']} tokens, and greedy text is not bound."
        if entropy
        else "no entropy was measured."
    )
    batch = batch_of(record)
    batched = BATCHED.format(batch=batch) if batch > 1 else ""
    chosen = [("Latency and work", WORK, WORK_CAPTION.format(n=n, batched=batched))]
    if record.get("comparison"):
        chosen.append(("Cost model and ceilings", ANALYSIS, ANALYSIS_CAPTION.format(n=n, entropy=source)))
    return [
        (
            title,
            ["arm", *(name for name, _ in columns_)],
            [[arm["name"], *(render(arm, record) for _, render in columns_)] for arm in arms],
            note,
        )
        for title, columns_, note in chosen
    ]


def terminal(record: dict[str, Any]) -> Group:
    """What is printed: the arms, their latency and work, what the cost model says, how deep guesses were accepted."""
    heads, depths = ["arm", *(name for name, _ in columns(record))], depth_rows(record)
    tables = [printed(record["title"], heads, rows(record), caption(record))]
    tables += [printed(*section) for section in sections(record)]
    if depths:
        tables.append(printed("Accepted by depth", _depth_heads(depths), depths, DEPTH_CAPTION))
    return Group(*tables)


def markdown(record: dict[str, Any]) -> str:
    """The same with the command that made it, to be committed beside the record."""
    heads, depths = ["arm", *(name for name, _ in columns(record))], depth_rows(record)
    parts = [grid(heads, rows(record)), caption(record)]
    for title, heads, cells, note in sections(record):
        parts += [f"## {title}", grid(heads, cells), note]
    if depths:
        parts += ["## Accepted by depth", grid(_depth_heads(depths), depths), DEPTH_CAPTION]
    return document(record, *parts)


def document(record: Mapping[str, Any], *parts: str) -> str:
    """Markdown about a record: its title, the command that made it, and `parts`, with blank lines between them."""
    head = (f"# {record['title']}", f"    {command_line(record)}")
    return "\n\n".join((*head, *parts)) + "\n"


def printed(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], note: str) -> Table:
    """A table for the terminal; the first column holds names."""
    table = Table(title=title, caption=note, box=box.SIMPLE_HEAD, caption_justify="left")
    for i, name in enumerate(heads):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def grid(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column holds names."""
    lines = [" | ".join(row) for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *cells)]
    return "\n".join(f"| {line} |" for line in lines)


def _depth_heads(depths: Sequence[Sequence[str]]) -> list[str]:
    return ["arm", *map(str, range(1, len(depths[0])))]
