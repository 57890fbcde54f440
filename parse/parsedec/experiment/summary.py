"""From stored requests to the numbers of a table: sums, ratios, their intervals and tests.

A run with several seeds answers every problem once per seed. It is the problems that are a random sample, so every
interval and test is over problems, and the answers to one problem are taken together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from parsedec.experiment.intervals import Floats, by_problem, jackknifed, paired_change

Pair = tuple[dict[str, Any], dict[str, Any]]  # the same request, answered by the baseline and by an arm

SUMMED = {  # summary key -> where a request's result has it
    "target_calls": ("counters", "target_calls"),
    "target_rows": ("counters", "target_rows"),
    "judge_passes": ("counters", "judge_passes"),
    "judge_rows": ("counters", "judge_rows"),
    "draft_calls": ("counters", "draft_calls"),
    "draft_rows": ("counters", "draft_rows"),
    "draft_tokens": ("counters", "draft_tokens"),
    "kept_draft_tokens": ("counters", "kept_draft_tokens"),
    "inner_steps": ("counters", "inner_steps"),
    "prefill_s": ("times", "prefill_s"),
    "draft_s": ("times", "draft_s"),
    "judge_s": ("times", "judge_s"),
    "decode_s": ("times", "decode_s"),
    "wall_s": ("times", "wall_s"),
}


def summarise(requests: Sequence[dict[str, Any]], *, batch: int = 1) -> dict[str, Any]:
    """Sums over the requests that have a result.

    accuracy   of all requests that were scored, errors counting as wrong; its interval is over problems
    latency, first_token   seconds until the answer was complete, and until its first token was certain: quantiles over
               requests. Latency is None where requests of a batch have only shares of its seconds (`latencies`)
    target_pairs, draft_pairs   query-key pairs of attention, estimated from the stored counts (`attended`)
    tau        tokens committed per verified tree: the accepted guesses and the target's own token behind them, a ratio
               of sums. None if nothing was ever guessed
    offered_by_depth, accepted_by_depth   [d] trees that reached, and were accepted to, depth d + 1 or more
    """
    results = [request["result"] for request in requests if request.get("result")]
    scored = [request for request in requests if request.get("correct") is not None]
    marks = [bool(request["correct"]) for request in scored]
    summary: dict[str, Any] = {
        "accuracy": sum(marks) / len(marks) if marks else None,
        "accuracy_interval": _accuracy_interval(scored) if marks else None,
        "requests": len(requests),
        "problems": len({request["id"] for request in requests}),
        "errors": sum(1 for request in requests if request.get("error")),
        "new_tokens": sum(len(result["tokens"]) for result in results),
        "rounds": sum(len(result["rounds"]) for result in results),
        "accepted_whole": sum(any(r["accepted_whole"] for r in result["rounds"]) for result in results),
    }
    summary |= {key: sum(result[group].get(name, 0) for result in results) for key, (group, name) in SUMMED.items()}
    summary["prompt_tokens"] = sum(result.get("prompt_tokens", 0) for result in results)
    for model in ("target", "draft"):
        summary[f"{model}_pairs"] = sum(attended(result, f"{model}_rows") for result in results)
    for key in ("offered_by_depth", "accepted_by_depth"):
        summary[key] = sum_by_depth([result["counters"].get(key) or () for result in results])
    trees, guessed = summary["inner_steps"], sum(summary["offered_by_depth"])
    summary["tau"] = (trees + sum(summary["accepted_by_depth"])) / trees if trees and guessed else None
    summary["tokens_per_s"] = summary["new_tokens"] / summary["wall_s"] if summary["wall_s"] else None
    summary["kept_share"] = summary["kept_draft_tokens"] / summary["draft_tokens"] if summary["draft_tokens"] else None
    firsts = [result["times"]["first_token_s"] for result in results]
    for name, taken in (("first_token_s", firsts), ("latency_s", latencies(results, batch))):
        summary |= {f"{name}_p{q}": float(np.percentile(taken, q)) if taken else None for q in (50, 95, 99)}
    summary["judge_paths"] = sorted({result["judge_path"] for result in results if result["judge_path"]})
    return summary


def latencies(results: Sequence[Mapping[str, Any]], batch: int) -> list[float]:
    """Seconds until each answer was complete. Older results have no `elapsed_s`: of those, `wall_s` is the latency if
    they were answered alone; in a batch it is only a share of its seconds, and nothing is known: []."""
    elapsed = [result["times"].get("elapsed_s") for result in results]
    if None in elapsed:
        return [result["times"]["wall_s"] for result in results] if batch == 1 else []
    return elapsed


def again(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's record with its summaries and comparison made anew from its requests, as earlier versions counted
    otherwise. All are made anew, not only what is missing, so that all figures of a table are made the same way."""
    batch = batch_of(record)
    arms = [arm | {"summary": summarise(arm["requests"], batch=batch)} for arm in record["arms"]]
    found = {**record, "arms": arms} | ({"summary": arms[0]["summary"]} if "summary" in record else {})
    if "comparison" in record:
        found["comparison"] = comparison({arm["name"]: arm["requests"] for arm in arms}, record["baseline"])
    return found


def comparison(arms: Mapping[str, Sequence[dict[str, Any]]], baseline: str) -> list[dict[str, Any]]:
    """A row (`compare`) for every arm that can be paired with the baseline; arms: name -> requests."""
    rows = [(name, compare(arms[baseline], own)) for name, own in arms.items() if name != baseline]
    return [{"arm": name, **row} for name, row in rows if row]


def batch_of(record: Mapping[str, Any]) -> int:
    """How many requests were answered at a time."""
    return int((record.get("config") or {}).get("batch") or 1)


def attended(result: dict[str, Any], rows: str) -> float:
    """Query-key pairs of a request's passes, estimated: rows were counted, not what each of them sees. The prompt is
    causal; every other row is taken to see the prompt and half of the answer."""
    prompt, answer, total = result.get("prompt_tokens", 0), len(result["tokens"]), result["counters"].get(rows, 0)
    first = min(total, prompt)
    return float(first * first / 2 + (total - first) * (prompt + answer / 2))


def _accuracy_interval(scored: Sequence[dict[str, Any]]) -> list[float]:
    """Wilson's interval over problems; one that has several answers counts by its share of right ones."""
    shares: dict[str, list[bool]] = {}
    for request in scored:
        shares.setdefault(request["id"], []).append(bool(request["correct"]))
    return wilson(sum(sum(marks) / len(marks) for marks in shares.values()), len(shares))


def wilson(hits: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson 1927). Unlike the normal approximation, it has a width at 0 and 1."""
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Area under the ROC curve: the probability that something right scores above something wrong, ties counting half.

    scores [n]; right [n] bool, both kinds among them. Counted by ranks (Mann and Whitney): far faster than integrating
    the curve, and a bootstrap asks for hundreds.
    """
    good, bad = scores[right], np.sort(scores[~right])
    below, up_to = (np.searchsorted(bad, good, side).sum() for side in ("left", "right"))
    return float((below + up_to) / 2 / (len(good) * len(bad)))


def harmonic(a: float | None, b: float | None) -> float | None:
    """Harmonic mean: 0 if both are 0, None if one is not known."""
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b else 0.0


def resampled(n: int, seed: int, resamples: int = 2000) -> np.ndarray:
    """Bootstrap draws over n problems: indices [resamples, n]."""
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def compare(baseline: Sequence[dict[str, Any]], arm: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """An arm against the baseline, paired by problem, with 95 % intervals; None if nothing can be paired.

    speedup           ratio of tokens per second, all tokens over all wall-clock seconds
    time_ratio        baseline's seconds over the arm's, for the same requests
    accuracy_change   arm minus baseline, as shares of the requests that both were scored on; None if there are none
    better, worse     problems that the arm gets right more, or less, often than the baseline
    mcnemar_p         how often a fair coin splits them so unevenly (McNemar's exact test, two-sided); None if nothing
                      was scored

    Speed is measured on the `requests` that both answered, of so many `problems`. It is None if there are none, and has
    no interval for fewer than `intervals.FEWEST`. Accuracy is measured on the `scored` ones, answered or not: what an
    arm cannot answer, it has not got right.
    """
    first = {asked(request): request for request in baseline}
    pairs = [(other, request) for request in arm if (other := first.get(asked(request)))]
    answered = [pair for pair in pairs if all(request.get("result") for request in pair)]
    scored = [pair for pair in pairs if all(request.get("correct") is not None for request in pair)]
    if not answered and not scored:
        return None
    speed = by_problem(((pair[1]["id"], _work(pair)) for pair in answered), 4)
    right = by_problem(((pair[1]["id"], _rightness(pair)) for pair in scored), 5)
    better, worse = (int((right[:, 1] * sign > right[:, 0] * sign).sum()) for sign in (1, -1))
    return {
        "requests": len(answered),
        "problems": len(speed),
        "scored": len(scored),
        **_with_interval("speedup", speed, _speedup),
        **_with_interval("time_ratio", speed, _time_ratio),
        **_change(right),
        "better": better,
        "worse": worse,
        "mcnemar_p": mcnemar(better, worse) if scored else None,
    }


def _work(pair: Pair) -> tuple[float, ...]:
    """Tokens and seconds of both."""
    results = [request["result"] for request in pair]
    return tuple(fact for result in results for fact in (len(result["tokens"]), result["times"]["wall_s"]))


def _rightness(pair: Pair) -> tuple[float, ...]:
    """Whether each is right, whether the arm alone is, the baseline alone, and 1."""
    first, second = (bool(request["correct"]) for request in pair)
    return tuple(map(float, (first, second, second > first, first > second, True)))


def _speedup(sums: Floats) -> float:
    tokens_a, wall_a, tokens_b, wall_b = sums
    return float(tokens_b / wall_b / (tokens_a / wall_a))


def _time_ratio(sums: Floats) -> float:
    return float(sums[1] / sums[3])


def _with_interval(name: str, rows: Floats, ratio: Callable[[Floats], float]) -> dict[str, float | None]:
    """A ratio of sums over problems, rows [n, facts], and its interval; None for no problems."""
    found = jackknifed(rows, ratio) if len(rows) else (None, None, None)
    return {f"{name}{end}": value for end, value in zip(("", "_low", "_high"), found, strict=True)}


def _change(rows: Floats) -> dict[str, float | None]:
    """The change of accuracy and its interval, of rows as in `_rightness`; None for no problems."""
    found: tuple[float | None, ...] = (None, None, None)
    if len(rows):
        gained, lost, answers = rows.sum(0)[2:].tolist()
        n = len(rows)  # problems, not answers
        found = ((gained - lost) / answers, *paired_change(gained * n / answers, lost * n / answers, n))
    return {f"accuracy_change{end}": value for end, value in zip(("", "_low", "_high"), found, strict=True)}


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of a split of better + worse fair coins (McNemar 1947)."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / (1 << n))


def asked(request: Mapping[str, Any]) -> tuple[str, int | None]:
    """What two requests have in common that ask for the same in two arms."""
    return request["id"], request.get("seed")


def sum_by_depth(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums by depth, of requests that need not be equally deep."""
    return [sum(level) for level in zip_longest(*counts, fillvalue=0)]
