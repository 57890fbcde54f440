"""Golden vectors: step-by-step records of the reference implementations, replayed through ours.

A root folder holds `eagle3/cases/*`, `medusa/cases/*` and `medusa/tree_buffers.json`. A case names its target and head;
its checker drives the adapter with the engine's own session and acceptance rule, and yields for every recorded item
whether ours is equal: whole numbers exactly, scores and tensors within 1e-4 and float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parsedec.errors import ConfigError, ParsedecError

Items = Iterator[tuple[str, bool]]
TREES = "tree_buffers.json"  # Medusa's tables: a case of their own, which no model takes part in


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case: its name, how many items were compared and equal, and the names of those that were not."""

    name: str
    items: int
    unequal: tuple[str, ...]
    fault: str = ""  # why the case could not be run to its end


def find_cases(root: Path) -> list[Path]:
    """Every case under `root`; raises ConfigError where there is none."""
    if not root.is_dir():
        raise ConfigError(f"root={root} is no folder; expected one that holds eagle3/cases or medusa/cases.")
    found = sorted(path.parent for family in ("eagle3", "medusa") for path in root.glob(f"{family}/cases/*/case.json"))
    found += sorted(root.glob(f"medusa/{TREES}"))
    if not found:
        raise ConfigError(f"root={root} holds no golden case; expected eagle3/cases/NAME/case.json or the like.")
    return found


def run_case(case: Path, attentions: Sequence[str]) -> CaseResult:
    """Check a case once for each attention implementation of the target."""
    name = case.stem if case.name == TREES else case.name
    family = case.parent.name if case.name == TREES else case.parent.parent.name
    items, unequal = 0, []
    try:
        for how, found in _checks(family, case, attentions):
            for item, equal in found:
                items += 1
                unequal += [] if equal else [f"{how}{item}"]
    except ParsedecError as error:  # the other cases are still worth running
        return CaseResult(
            name=f"{family}/{name}", items=items + 1, unequal=(*unequal, "could not be run"), fault=str(error)
        )
    return CaseResult(name=f"{family}/{name}", items=items, unequal=tuple(unequal))


def run_cases(root: Path, attentions: Sequence[str], report: Callable[[CaseResult], None]) -> list[CaseResult]:
    """All cases under `root`, each reported as it is done."""
    results = []
    for case in find_cases(root):
        results.append(run_case(case, attentions))
        report(results[-1])
    return results


def _checks(family: str, case: Path, attentions: Sequence[str]) -> Iterator[tuple[str, Items]]:
    if family == "eagle3":
        from parsedec_adapters.golden import eagle3

        yield from ((f"{attention}: ", eagle3.check(case, attention)) for attention in attentions)
        return
    from parsedec_adapters.golden import medusa

    if case.name == TREES:
        yield "", medusa.check_tree_buffers(case)
    else:
        yield from ((f"{attention}: ", medusa.check(case, attention)) for attention in attentions)
