"""What PARSE (arXiv 2605.04263) should gain where nothing can be measured: a cost model of passes, from assumptions.

A pass takes as long as reading weights or computing rows, whichever takes longer, plus each layer's exchange between
GPUs:

    pass(rows) = max(weights read / bandwidth, 2 * active parameters * rows / matrix rate) + layers * exchange

A mixture of experts reads a share 1 - (1 - active/total)^rows of its weights. Caches and the attention over them are
left out, as they are small beside the weights while contexts are short; so are queues: the batch is 1.

Letters:  P prompt tokens, N draft tokens, K probes, S rows of a probe's suffix, L answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parsedec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The GPUs that a model is spread over, and the shares of their peak rates that are reached.

    exchange_us  microseconds for one layer's exchange between them (two all-reduces) and its kernel launches
    Raises ConfigError for impossible values.
    """

    count: int
    bandwidth_tb_s: float
    matrix_tflop_s: float
    bandwidth_share: float
    matrix_share: float
    exchange_us: float

    def __post_init__(self) -> None:
        rates = (self.bandwidth_tb_s, self.matrix_tflop_s, self.bandwidth_share, self.matrix_share)
        if self.count < 1 or min(rates) <= 0 or max(rates[2:]) > 1 or self.exchange_us < 0:
            raise ConfigError(f"{self} is impossible; expected at least one GPU, rates above 0 and shares up to 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model on a server.

    total_b, active_b  parameters in billions: all of them, and those that one token uses
    bytes_per_weight   1 in FP8, 2 in bfloat16
    tokens_per_call    tokens that a call yields with the model's own speculation (EAGLE-3, n-gram); 1: none
    call_rows          rows of a call that verifies such guesses
    Raises ConfigError for impossible values.
    """

    total_b: float
    active_b: float
    layers: int
    bytes_per_weight: float
    tokens_per_call: float
    call_rows: int

    def __post_init__(self) -> None:
        if not 0 < self.active_b <= self.total_b or self.tokens_per_call < 1 or self.call_rows < 1:
            raise ConfigError(f"{self} is impossible; expected 0 < active_b <= total_b and at least a token a call.")

    def pass_s(self, rows: int, gpus: Gpus) -> float:
        """The seconds that a pass over `rows` rows takes."""
        read = (
            self.total_b * (1 - (1 - self.active_b / self.total_b) ** rows)
            if self.active_b < self.total_b
            else self.total_b
        )
        memory = read * 1e9 * self.bytes_per_weight / (gpus.count * gpus.bandwidth_tb_s * 1e12 * gpus.bandwidth_share)
        matrix = 2 * self.active_b * 1e9 * rows / (gpus.count * gpus.matrix_tflop_s * 1e12 * gpus.matrix_share)
        return max(memory, matrix) + self.layers * gpus.exchange_us * 1e-6

    def token_s(self, gpus: Gpus) -> float:
        """The seconds that a token of an answer takes."""
        return self.pass_s(self.call_rows if self.tokens_per_call > 1 else 1, gpus) / self.tokens_per_call


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """P, L, K and S, where a draft is as long as the answer; `http_s` is the overhead of a call to a server."""

    prompt: int
    answer: int
    probes: int
    suffix: int
    http_s: float


def expected(
    target: Served, draft: Served, target_gpus: Gpus, draft_gpus: Gpus, request: Request, kept: float
) -> dict[str, float]:
    """Seconds of one request by phase, and the speed-up over the target alone (with its own speculation).

    kept  share of the draft that is kept; the target writes the rest
    """
    n = request.answer
    alone = target.pass_s(request.prompt, target_gpus) + n * target.token_s(target_gpus) + request.http_s
    phases = {
        "draft_s": draft.pass_s(request.prompt, draft_gpus) + n * draft.token_s(draft_gpus) + request.http_s,
        "judge_s": target.pass_s(request.prompt + n + request.probes * request.suffix, target_gpus) + request.http_s,
        "decode_s": (1 - kept) * n * target.token_s(target_gpus) + (request.http_s if kept < 1 else 0.0),
    }
    return {"kept": kept, "alone_s": alone, **phases, "speedup": alone / sum(phases.values())}


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Rows of `expected`, each with the name of its setting, as a Markdown table."""
    lines = [
        "| target decodes with | kept share | target alone, s | draft, s | judge, s | decode, s | speed-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows:
        seconds = " | ".join(f"{row[key]:.2f}" for key in ("alone_s", "draft_s", "judge_s", "decode_s"))
        lines.append(f"| {name} | {row['kept']:.0%} | {seconds} | {row['speedup']:.2f} |")
    return "\n".join(lines) + "\n"


def tabulate(
    target: Served, draft: Served, gpus: tuple[Gpus, Gpus], request: Request, kept: Sequence[float]
) -> list[tuple[str, dict[str, Any]]]:
    """Rows of `table` for a target that decodes plainly, and for one with the speculation that `target` names.

    The draft model decodes as `draft` says in either case.
    """
    plain = Served(
        total_b=target.total_b, active_b=target.active_b, layers=target.layers,
        bytes_per_weight=target.bytes_per_weight, tokens_per_call=1.0, call_rows=1)  # fmt: skip
    fast = f"speculation, {target.tokens_per_call:g} tokens a call"
    kinds = [("plain decoding", plain)] + ([(fast, target)] if target.tokens_per_call > 1 else [])
    return [(name, expected(model, draft, *gpus, request, share)) for name, model in kinds for share in kept]
