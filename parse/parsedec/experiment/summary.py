"""From stored requests to the numbers of a table: sums, ratios and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

SUMMED = {  # summary key -> where a request's result has it
    "target_calls": ("counters", "target_calls"),
    "target_rows": ("counters", "target_rows"),
    "judge_passes": ("counters", "judge_passes"),
    "judge_rows": ("counters", "judge_rows"),
    "draft_tokens": ("counters", "draft_tokens"),
    "kept_draft_tokens": ("counters", "kept_draft_tokens"),
    "inner_steps": ("counters", "inner_steps"),
    "prefill_s": ("times", "prefill_s"),
    "draft_s": ("times", "draft_s"),
    "judge_s": ("times", "judge_s"),
    "decode_s": ("times", "decode_s"),
    "wall_s": ("times", "wall_s"),
}


def summarise(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the requests that have a result.

    accuracy   over all that were scored, errors counting as wrong
    tau        tokens committed per verified tree: the accepted guesses, and the target's own token behind them. Summed,
               then divided. None where nothing was ever guessed
    offered_by_depth, accepted_by_depth   [d] trees that reached, and were accepted to, depth d + 1 or more
    """
    results = [request["result"] for request in requests if request.get("result")]
    marks = [bool(request["correct"]) for request in requests if request.get("correct") is not None]
    summary: dict[str, Any] = {
        "accuracy": sum(marks) / len(marks) if marks else None,
        "accuracy_interval": wilson(sum(marks), len(marks)) if marks else None,
        "requests": len(requests),
        "errors": sum(1 for request in requests if request.get("error")),
        "new_tokens": sum(len(result["tokens"]) for result in results),
        "rounds": sum(len(result["rounds"]) for result in results),
        "accepted_whole": sum(any(r["accepted_whole"] for r in result["rounds"]) for result in results),
    }
    summary |= {key: sum(result[group][name] for result in results) for key, (group, name) in SUMMED.items()}
    for key in ("offered_by_depth", "accepted_by_depth"):
        summary[key] = sum_by_depth([result["counters"].get(key) or () for result in results])
    trees, guessed = summary["inner_steps"], sum(summary["offered_by_depth"])
    summary["tau"] = (trees + sum(summary["accepted_by_depth"])) / trees if trees and guessed else None
    summary["tokens_per_s"] = summary["new_tokens"] / summary["wall_s"] if summary["wall_s"] else None
    summary["kept_share"] = summary["kept_draft_tokens"] / summary["draft_tokens"] if summary["draft_tokens"] else None
    summary["first_token_s_p50"] = _median([result["times"]["first_token_s"] for result in results])
    summary["judge_paths"] = sorted({result["judge_path"] for result in results if result["judge_path"]})
    return summary


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson 1927); honest at 0 and 1, where the plain one has no width."""
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def resampled(n: int, seed: int, resamples: int = 2000) -> np.ndarray:
    """Bootstrap draws over n problems: indices [resamples, n]."""
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def compare(
    baseline: Sequence[dict[str, Any]], arm: Sequence[dict[str, Any]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float] | None:
    """An arm against the baseline on the requests both answered, with 95 % paired bootstrap intervals.

    speedup           ratio of tokens per second, all tokens over all wall-clock seconds
    time_ratio        baseline's seconds over the arm's, for the same requests
    accuracy_change   arm minus baseline, in share of requests
    """
    first = {request["id"]: request for request in baseline if request.get("result")}
    pairs = [(first[r["id"]], r) for r in arm if r.get("result") and r["id"] in first]
    if not pairs:
        return None
    rows = np.array([[*_facts(a), *_facts(b)] for a, b in pairs], dtype=float)  # [n, 6]
    draws = resampled(len(rows), seed, resamples)
    samples = np.stack([_ratios(rows[draw].sum(0), len(rows)) for draw in draws])  # [resamples, 3]
    low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    estimate = _ratios(rows.sum(0), len(rows))
    names = ("speedup", "time_ratio", "accuracy_change")
    out: dict[str, float] = {"requests": len(pairs)}
    for i, name in enumerate(names):
        out |= {name: float(estimate[i]), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
    return out


def _facts(request: dict[str, Any]) -> tuple[float, float, float]:
    result = request["result"]
    return len(result["tokens"]), result["times"]["wall_s"], float(bool(request.get("correct")))


def _ratios(sums: np.ndarray, n: int) -> np.ndarray:
    tokens_a, wall_a, right_a, tokens_b, wall_b, right_b = sums
    return np.array([tokens_b / wall_b / (tokens_a / wall_a), wall_a / wall_b, (right_b - right_a) / n])


def sum_by_depth(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums by place; requests do not all get equally deep."""
    return [sum(level) for level in zip_longest(*counts, fillvalue=0)]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
