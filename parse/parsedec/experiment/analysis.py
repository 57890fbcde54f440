"""What a record's counts say about its arms: the work they did, what the cost model expected of them, and the ceilings.

The cost model, at batch 1 (t: seconds per token of the target and of the draft model decoding alone in the same run, N:
tokens, rho: what the inner level gains alone):

    seconds = prefill + N_drafted * t_draft + judge passes + N_written_by_target * t_target / rho

Its ceiling is t_target / t_draft: every drafted token stands and judging is free. The ceiling of token-level
speculation is the one of Pankratov and Alistarh (arXiv 2512.11718): a lossless deterministic speculator whose verifier
reads P guesses per call gets at most (m + m2) ln(P) / m^2 + O(1) of them right on average, m being the expected entropy
of the target's next token, E[-ln p], and m2 = E[(ln p)^2].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from parsedec.engine import Parse
from parsedec.experiment.summary import asked, summarise
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.sessions.reference import plain_logits
from parsedec.tasks.base import is_later_turn
from parsedec.types import Sampling

Json = dict[str, Any]
T = TypeVar("T", float, NDArray[np.float64])
ENTROPY_REQUESTS = 32  # answers whose every token's entropy is taken
ENTROPY_ROWS = 64  # distributions at a time: of a long answer all at once would fill a GPU's memory


def model_facts(model: LanguageModel) -> Json:
    """What work is computed from.

    row_parameters   parameters a row is multiplied with: all but an input embedding of its own; of a mixture's experts
                     the share that is used
    attention_width  heads * head size, summed over the layers that attend: a query-key pair costs 4 FLOPs for each
    devices          those that hold a parameter

    Of a model on a server only its name: its rows are not known, nor where it runs.
    """
    if isinstance(model, RemoteModel):
        return {"name": model.name}
    config = model.hf.config.get_text_config()
    embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    separate = head is not None and embedding.weight is not head.weight
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = config.num_experts_per_tok / experts if experts else 1.0
    named = list(model.hf.named_parameters())
    rows = sum(weight.numel() * (used if "experts" in name.split(".") else 1.0) for name, weight in named)
    layers = sum(hasattr(layer, "keys") for layer in DynamicCache(config=model.hf.config).layers)
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or model.hidden_size // max(1, heads)
    return {
        "name": model.name,
        "parameters": sum(weight.numel() for _, weight in named),
        "row_parameters": round(rows) - (embedding.weight.numel() if separate else 0),
        "attention_width": layers * heads * size,
        "devices": sorted({str(weight.device) for _, weight in named}),
    }


def engine_facts(engine: Parse) -> Json:
    """The models of an arm; no draft model where its outer level uses none."""
    draft = engine.draft if engine.outer.needs_draft else None
    return {"target": model_facts(engine.target), "draft": model_facts(draft) if draft else None}


def measure_entropy(engine: Parse, requests: Sequence[Json], sampling: Sampling) -> Json | None:
    """Sums over the target's next-token distributions along stored answers, one forward each, outside the timed part.

    nats, squared   sums of E[-ln p] and of E[(ln p)^2] at each of `tokens` positions
    temperature     of the distributions: the run's, or 1 where it is greedy

    Later turns of a conversation are left out: a request holds its own prompt, not what was said before. None where
    there is no answer, or the target is on a server, which does not show its distributions.
    """
    if isinstance(engine.target, RemoteModel):
        return None
    temperature = 1.0 if sampling.greedy else sampling.temperature
    tokens, nats, squared = 0, 0.0, 0.0
    answered = [
        request for request in requests
        if request.get("result") and request["result"]["tokens"] and not is_later_turn(request["id"])
    ]  # fmt: skip
    for request in answered[:ENTROPY_REQUESTS]:
        ids, answer = engine.target_ids(request["prompt"]), request["result"]["tokens"]
        logits = plain_logits(engine.target, [*ids, *answer[:-1]], last=len(answer))  # [T, V]
        tokens += len(answer)
        for start in range(0, len(answer), ENTROPY_ROWS):
            logp = (logits[start : start + ENTROPY_ROWS].float() / temperature).log_softmax(-1)
            finite = torch.where(logp.isfinite(), logp, 0.0)
            weighted = logp.exp() * finite
            nats -= float(weighted.sum(dtype=torch.float64))
            squared += float((weighted * finite).sum(dtype=torch.float64))
    if not tokens:
        return None
    return {"tokens": tokens, "nats": nats, "squared": squared, "temperature": temperature,
            "requests": min(len(answered), ENTROPY_REQUESTS)}  # fmt: skip


def token_ceiling(entropy: Json, per_call: float) -> float | None:
    """Most guesses per call that a lossless speculator gets right on average, but for O(1); None for no guesses."""
    mean, second = entropy["nats"] / entropy["tokens"], entropy["squared"] / entropy["tokens"]
    return (mean + second) * math.log(per_call) / mean**2 if per_call > 1 and mean > 0 else None


def rows_per_tree(summary: Json) -> float | None:
    """P: rows of the target per verified tree, prompts and judge passes left out."""
    decoding = summary["target_rows"] - summary["judge_rows"] - summary["prompt_tokens"]
    return decoding / summary["inner_steps"] if summary["inner_steps"] else None


def flops(facts: Json | None, rows: int, pairs: float) -> float | None:
    """2 x parameters x rows, and the attention of `pairs` query-key pairs; None for a model on a server."""
    if facts is not None and "row_parameters" not in facts:
        return None
    return 0.0 if facts is None else 2.0 * facts["row_parameters"] * rows + 4.0 * facts["attention_width"] * pairs


def work(arm: Json) -> Json:
    """FLOPs of target and draft model, and device seconds: wall-clock times the devices that hold the arm's models.

    Passes of an inner speculator's own head or model are in the time, not in the FLOPs. None for what a server does.
    """
    facts, summary = arm["models"], arm["summary"]
    models = [model for model in facts.values() if model]
    devices = {device for model in models for device in model.get("devices", ())}
    known = all("devices" in model for model in models)
    return {
        "target_flops": flops(facts["target"], summary["target_rows"], summary["target_pairs"]),
        "draft_flops": flops(facts["draft"], summary["draft_rows"], summary["draft_pairs"]),
        "device_s": summary["wall_s"] * len(devices) if known else None,
        "cpu": devices == {"cpu"},
    }


def token_seconds(summary: Json) -> float | None:
    """Seconds per decoded token of an arm that only decodes; the first token of an answer comes with the prefill."""
    decoded = summary["new_tokens"] - (summary["requests"] - summary["errors"])
    return summary["decode_s"] / decoded if decoded > 0 else None


def expected_seconds(prefill_s: T, draft_s: T, judge_s: T, written: T, token_s: T) -> T:
    """The cost model. `written`: what the target writes, in tokens of a pace of `token_s` seconds each; arrays hold a
    request an element."""
    return prefill_s + draft_s + judge_s + written * token_s


def predict(record: Json, arm: Json) -> Json | None:
    """What the cost model says of an arm that drafts and judges, from the costs of the arms that only decode.

    speedup   the baseline's seconds over the predicted ones, for the same requests; `ceiling` t_target / t_draft
    draft_of  "draft arm": t_draft is the draft model's alone; "own": this arm's, where it runs nowhere alone
    rho_of    likewise for the inner level: another arm with the same one and no outer level, or this arm's own decoding

    None for arms it says nothing of, among them one whose draft model runs alone, but not with the inner level it has
    here: its own pace would stand among those of arms that only draft.
    """
    summary = arm["summary"]
    base = next((other for other in record["arms"] if other["name"] == record.get("baseline")), None)
    if base is None or base is arm or not summary["judge_paths"] or not summary["draft_tokens"]:
        return None
    target_s = token_seconds(base["summary"])
    drafts = [other for other in record["arms"] if _is_draft_of(other, arm)]
    alone = next((other for other in drafts if _draft_inner(other) == _draft_inner(arm)), None)
    if drafts and alone is None:
        return None
    draft_s = token_seconds(alone["summary"]) if alone else summary["draft_s"] / summary["draft_tokens"]
    if not target_s or not draft_s:
        return None
    inner = next((other for other in record["arms"] if _is_inner_of(other, arm)), None)
    own_s = summary["decode_s"] / max(1, summary["new_tokens"] - summary["kept_draft_tokens"])
    inner_s = token_seconds(inner["summary"]) if inner else own_s
    if (same := _same_requests([base, arm, *([alone] if alone else [])])) is None:
        return None
    prefill = same[0]["prefill_s"] + (same[2]["prefill_s"] if alone else 0.0)
    written = float(same[1]["new_tokens"] - same[1]["kept_draft_tokens"])
    drafting = same[1]["draft_tokens"] * draft_s
    seconds = expected_seconds(prefill, drafting, same[1]["judge_s"], written, inner_s or 0.0)
    return {
        "speedup": same[0]["wall_s"] / seconds,
        "ceiling": target_s / draft_s,
        "draft_of": "draft arm" if alone else "own",
        "rho_of": inner["name"] if inner else "own",
    }


def _same_requests(arms: Sequence[Json]) -> list[Json] | None:
    """Summaries of the arms over the requests that all of them answered; None where there are none."""
    answered = [{asked(request) for request in arm["requests"] if request.get("result")} for arm in arms]
    shared = set.intersection(*answered)
    if not shared:
        return None
    if all(own == shared for own in answered):
        return [arm["summary"] for arm in arms]
    return [summarise([request for request in arm["requests"] if asked(request) in shared]) for arm in arms]


def _draft_inner(arm: Json) -> list[str]:
    """The settings of the inner level with which an arm drafts; of an arm of the draft model alone, of its own."""
    words = [word.replace("inner@draft.inner", "inner").replace("draft.inner", "inner") for word in
             arm["description"].split() if word.startswith(("inner@draft.inner", "draft.inner"))]  # fmt: skip
    if not words and not arm["models"]["draft"]:
        words = [word for word in arm["description"].split() if word.startswith("inner")]
    return sorted(word for word in words if word != "inner=none")


def _is_draft_of(other: Json, arm: Json) -> bool:
    """Whether `other` is the draft model of `arm` in the target's place."""
    facts, mine = other.get("models"), arm.get("models")
    return bool(facts and mine and mine["draft"] and not facts["draft"]
                and facts["target"]["name"] == mine["draft"]["name"])  # fmt: skip


def _is_inner_of(other: Json, arm: Json) -> bool:
    """Whether `other` is the target of `arm` with the same inner level and no outer one."""
    facts, mine = other.get("models"), arm.get("models")
    if not facts or not mine or facts["target"] != mine["target"] or "outer=none" not in other["description"].split():
        return False
    theirs, ours = (
        sorted(
            setting for setting in one["description"].split() if setting.startswith(("inner=", "inner.", "acceptance"))
        )
        for one in (other, arm)
    )
    return theirs == ours
