"""Checks the parts of a stack and binds them to its models, before any request."""

from __future__ import annotations

from parsedec.acceptance import Acceptance
from parsedec.errors import ChatTemplateError, ConfigError, IncompatibleStack, require_part, shown
from parsedec.inner import InnerSpeculator
from parsedec.judge import JudgeNeeds
from parsedec.models.language_model import LanguageModel
from parsedec.outer import SLOTS, AsksJudge, Outer
from parsedec.remote.stack import check_judge

SPECULATOR = (InnerSpeculator, "one of parsedec_adapters, e.g. parsedec_adapters.draft_model.DraftModel(length=4)")
# What may stand in the slots of a stack, and an example
PARTS: dict[str, tuple[type, str]] = {
    "inner": SPECULATOR,
    "draft_inner": SPECULATOR,
    "acceptance": (Acceptance, "Siblings()"),
    "outer": (Outer, "PrefixVerification()"),
    "judge": SLOTS["judge"],
}


def check_models(target: object, draft: object) -> None:
    """Raise ConfigError for anything that is not a loaded model."""
    for name, model in (("target", target), ("draft", draft)):
        if not isinstance(model, LanguageModel) and (model is not None or name == "target"):
            raise ConfigError(
                f"{name} is {shown(model)}; expected a loaded model. Use load(…) for a hub id, a directory, a GGUF "
                "file or zoo:NAME, and LanguageModel.wrap(model, tokenizer) for a transformers model."
            )


def check_parts(**parts: object) -> None:
    """Raise ConfigError if a part does not fit the slot it was given for."""
    for name, part in parts.items():
        if part is not None:
            require_part(name, part, *PARTS[name])


def check_draft(outer: Outer, target: LanguageModel, draft: LanguageModel | None) -> None:
    """Raise IncompatibleStack or ChatTemplateError if the outer level cannot draft with this pair of models."""
    if outer.needs_draft and draft is None:
        raise IncompatibleStack(
            f"{type(outer).__name__} needs a draft model, but none is given; set draft, or use outer=none."
        )
    if outer.needs_draft and draft is not None and not draft.has_template and not target.same_vocabulary(draft):
        raise ChatTemplateError(
            f"the draft model {draft.name} has no chat template, and its vocabulary is not the target's, so it "
            "could read neither a prompt of its own nor the target's. Set draft.model.chat_template to Jinja text "
            "or a file."
        )


def bind_inner(inner: InnerSpeculator, model: LanguageModel, draft: LanguageModel | None) -> InnerSpeculator:
    """The speculator bound to `model`; raises IncompatibleStack if the model lacks layers that it reads."""
    bound = inner.bind(model, draft)
    require_part(f"{type(inner).__name__}.bind(…)", bound, InnerSpeculator, "a copy of it for the target")
    beyond = [layer for layer in bound.needs.hidden_layers if not 0 <= layer <= model.num_layers]
    if beyond:
        raise IncompatibleStack(
            f"{type(inner).__name__} reads hidden states {beyond}, but {model.name} has 0 to "
            f"{model.num_layers}. Was the head trained for another model?"
        )
    return bound


def judge_needs(outer: Outer, target: LanguageModel, draft: LanguageModel | None) -> JudgeNeeds:
    """What the judge of a bound outer level reads, if any; raises IncompatibleStack if this pair cannot provide it."""
    needs = outer.judge.needs if isinstance(outer, AsksJudge) else JudgeNeeds()
    check_judge(needs, target, draft)
    if needs.draft_logprobs and draft is not None and not target.same_vocabulary(draft):
        raise IncompatibleStack(
            f"the judge reads the draft model's probabilities token by token, but {draft.name} and {target.name} have "
            "different vocabularies, so there is none for each of the target's tokens. Use another judge, e.g. "
            "judge=label or judge=logprob."
        )
    return needs
