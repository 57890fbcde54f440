"""Does a model do what the engine relies on? Tried out on the model itself, when a stack is built.

A model may accept a cache, position ids or a mask and silently ignore it: results are then wrong without an error. Each
test compares a session's logits with plain forwards of the same tokens; they may differ by what rounding explains in
the model's dtype. Results are remembered (`findings`), so all engines of one model make each test once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parsedec.errors import IncompatibleStack
from parsedec.models.findings import crossed_window, found_out
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.sessions.backends import open_session, runs_static
from parsedec.sessions.reference import excess, plain_logits, random_tokens
from parsedec.types import JudgePath


def check_decoding(model: LanguageModel) -> None:
    """Raise IncompatibleStack unless decoding with a cache gives what plain forwards do, for two requests in turn."""
    if isinstance(model, RemoteModel):
        return  # the server was examined when it was connected
    runs_static(model)  # raises where the backend asked for cannot run it
    problem = found_out(model, "decoding", lambda: _decoding_error(model))
    if problem:
        raise IncompatibleStack(
            f"{model.name} cannot be decoded behind a cache of its own: {problem}. The engine needs a causal LM that "
            "keeps all its state in the cache it is given; models that hold state themselves do not."
        )


def probe_error(model: LanguageModel, suffix: Sequence[int], path: JudgePath) -> str | None:
    """What is wrong with judge passes on `path` on this model, or None if they are right."""
    return found_out(model, (path, *suffix), lambda: _probe_error(model, suffix, path))


def _decoding_error(model: LanguageModel) -> str | None:
    """Two interleaved requests, each read in steps of several tokens and of one."""
    texts = [random_tokens(model, 20, seed) for seed in (0, 1)]
    sessions = [open_session(_roomy(model)) for _ in texts]
    for start, stop in ((0, 12), (12, 15), (15, 16), (16, 19)):
        for session, ids in zip(sessions, texts, strict=True):
            session.feed(ids[start:stop])
    stepwise = torch.stack([session.feed(ids[19:]) for session, ids in zip(sessions, texts, strict=True)])
    return _difference(model, stepwise, torch.cat([plain_logits(model, ids) for ids in texts]), "stepwise")


def _probe_error(model: LanguageModel, suffix: Sequence[int], path: JudgePath) -> str | None:
    prompt = random_tokens(model, 12 + crossed_window(model), 0)
    draft, cuts = random_tokens(model, 24, 1), [7, 16, 24]
    session = open_session(_roomy(model))
    session.feed(prompt)
    probes = session.judge(draft, cuts, suffix, path=path).probe_logits
    plain = torch.cat([plain_logits(model, [*prompt, *draft[:cut], *suffix]) for cut in cuts])
    return _difference(model, probes, plain, f"{path}")


def _difference(model: LanguageModel, ours: Tensor, plain: Tensor, what: str) -> str | None:
    error = excess(model, ours, plain)
    return None if error is None else f"{what} logits differ from plain forwards by {error:.2g}"


def _roomy(model: LanguageModel) -> LanguageModel:
    """The model without a context limit that the test's few tokens might exceed, and without the compiler, which takes
    longer than the test."""
    return replace(model, context_limit=1 << 20, compiled=False)
