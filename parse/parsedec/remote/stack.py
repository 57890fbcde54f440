"""Which parts of a stack can work with a model on a server, and decoders for models here and there."""

from __future__ import annotations

from collections.abc import Sequence

from parsedec.acceptance import Acceptance
from parsedec.errors import IncompatibleStack
from parsedec.inner import Decoder, InnerSpeculator, NoSpeculation
from parsedec.judge import JudgeNeeds
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.remote.session import RemoteDecoder
from parsedec.sampling import Sampler


def open_decoder(
    model: LanguageModel,
    inner: InnerSpeculator,
    sampler: Sampler,
    tally: Tally,
    acceptance: Acceptance | None = None,
    layers: Sequence[int] = (),
) -> Decoder:
    """A decoder for one request, for a model here or on a server. `layers` is as in `Decoder`, for models here."""
    if isinstance(model, RemoteModel):
        return RemoteDecoder(model, inner, sampler, tally, acceptance)
    return Decoder(model, inner, sampler, tally, acceptance, layers)


def check_inner(inner: InnerSpeculator, model: LanguageModel, acceptance: Acceptance | None = None) -> None:
    """Raise IncompatibleStack for an inner level that would have to work inside a server, or a lossy rule."""
    if isinstance(model, RemoteModel) and not isinstance(inner, NoSpeculation):
        raise IncompatibleStack(
            f"{type(inner).__name__} cannot speculate for {model.name}: its tokens are chosen there. Use inner=none, "
            "and let the server speculate (docs/scale-out.md has the options)."
        )
    if isinstance(model, RemoteModel) and acceptance is not None and not acceptance.lossless:
        raise IncompatibleStack(
            f"{type(acceptance).__name__} cannot decide what {model.name} writes: it is chosen there. Use "
            "acceptance=siblings."
        )


def check_judge(needs: JudgeNeeds, target: LanguageModel, draft: LanguageModel | None) -> None:
    """Raise IncompatibleStack for a judge that needs what a server does not show."""
    if needs.hidden_layers and isinstance(target, RemoteModel):
        raise IncompatibleStack(
            f"the judge reads hidden layers {list(needs.hidden_layers)}, and {target.name} does not show them. Use "
            "judge=label or judge=digit, or engine=local."
        )
    if needs.draft_logprobs and isinstance(draft, RemoteModel):
        raise IncompatibleStack(
            f"the judge reads the draft model's probabilities of its own tokens, and those of {draft.name} are not "
            "asked for. Run the draft model here (engine.draft.url=null), or use judge=label."
        )
