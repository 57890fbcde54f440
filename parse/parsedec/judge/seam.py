"""The seam between an outer level and a judge, and the base of the judges that read one pass of the target.

Shapes in this file:  N draft tokens, K probes, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, Self

import torch
from torch import Tensor

from parsedec.boundary import Thresholds
from parsedec.errors import ConfigError, IncompatibleStack, JudgeError, shown
from parsedec.models.language_model import LanguageModel
from parsedec.remote.capabilities import Labels
from parsedec.remote.model import RemoteModel
from parsedec.sessions.backends import open_session
from parsedec.sessions.selftest import probe_error
from parsedec.sessions.session import Session
from parsedec.sessions.staged import JudgeRows
from parsedec.text.spelling import Draft
from parsedec.types import JudgePath

log = logging.getLogger(__name__)
SCORE = "a number from 0, surely wrong, to 1, surely right"
ROUNDING = 1e-4  # a score may be so far outside [0, 1], and is then counted as 0 or 1


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the probed cuts, in order, and what came out of the same pass.

    values          one score in [0, 1] per probe
    draft_logprobs  the target's log-probability of every draft token, nats
    """

    values: tuple[float, ...]
    draft_logprobs: tuple[float, ...]
    rows: int
    path: JudgePath
    note: str | None = None  # e.g. why the packed path was not taken


def judged(judge: Judge, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
    """The judge's scores, of which there is one a probe: an outer level could not tell which of them are missing.

    Raises JudgeError for anything else that a judge may return.
    """
    scores, name = judge.score(session, draft, cuts, probes), type(judge).__name__
    if not isinstance(scores, Scores):
        raise JudgeError(
            f"{name}.score gave {shown(scores)}; expected parsedec.judge.Scores(values=…, draft_logprobs=…, rows=…, "
            "path=…). A judge derived from PassJudge makes them itself, of what its `read` returns."
        )
    if len(scores.values) != len(probes):
        raise JudgeError(
            f"{name} gave {len(scores.values)} scores for {len(probes)} cuts; expected one for each, in their order."
        )
    if wrong := [value for value in scores.values if not _is_score(value)]:
        raise JudgeError(f"{name} gave the score {shown(wrong[0])}; expected {SCORE}.")
    return scores


def _is_score(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) <= 1


@dataclass(frozen=True, slots=True)
class JudgeNeeds:
    """What a judge reads besides logits.

    hidden_layers   of the target, indices as in `output_hidden_states`; its session is opened with them
    draft_logprobs  the draft model's log-probabilities of its own tokens, `Draft.logprobs`
    """

    hidden_layers: tuple[int, ...] = ()
    draft_logprobs: bool = False

    def __post_init__(self) -> None:  # a list is as good
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))


class Judge(Protocol):
    """How likely is the answer up to each cut free of errors? The draft is left staged in `session`."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; whatever is wrong with the pair is found here."""

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        """Scores of `probes`, a subset of `cuts`. `session` is one that `judging_session` could have opened."""

    @property
    def needs(self) -> JudgeNeeds:
        """What sessions and drafts must hold for it; known once it is bound."""

    @property
    def suffix_rows(self) -> int:
        """Rows a probe costs."""

    @property
    def card(self) -> Thresholds | None:
        """The thresholds that were calibrated for its scores on this target, if there are any."""


def judging_session(target: LanguageModel, judge: Judge) -> Session:
    """A new session of `target` that shows what the bound `judge` reads. The engine's are opened the same way, with
    the hidden states its inner speculator reads in front."""
    return open_session(target, judge.needs.hidden_layers)


@dataclass(frozen=True, slots=True)
class Reading:
    """One judge pass as its readers see it.

    cuts    all cuts of the draft, token positions; `probes` are those to be scored
    rows    what the target showed: logits, log-probabilities, hidden states
    layers  what the L taps of `rows` are, indices as in `output_hidden_states`
    before  tokens of the target that stand before the draft: the prompt, and the answer of earlier rounds
    """

    draft: Draft
    cuts: Sequence[int]
    probes: Sequence[int]
    rows: JudgeRows
    layers: tuple[int, ...]
    before: Sequence[int]
    model: LanguageModel

    @classmethod
    def take(
        cls,
        session: Session,
        draft: Draft,
        cuts: Sequence[int],
        probes: Sequence[int],
        *,
        suffix: Sequence[int] = (),
        path: JudgePath = JudgePath.CAUSAL,
        wanted: Sequence[int] | None = None,
    ) -> Reading:
        """Make the pass; the draft is left staged. `wanted`: ids whose logits its readers look at, as in `judge`."""
        rows = session.judge(draft.tokens, cuts, suffix, probes=probes, path=path, wanted=wanted)
        return cls(draft, cuts, probes, rows, session.taps, session.tokens, session.model)

    @property
    def texts(self) -> list[str]:
        """The text of every probed prefix of the draft [K], for judges that read what was written."""
        return [self.draft.piece(0, probe) for probe in self.probes]

    @property
    def context(self) -> str:
        """The text of what stands before the draft, chat turns as the target reads them: for judges that need the
        question. In later rounds the answer so far is its end."""
        return self.model.decode(self.before, special=True)

    def probe_states(self, layer: int) -> Tensor:
        """Hidden states of `layer` at every probe's last row [K, H] float32; without a suffix that is the cut's row."""
        return self._states(self.rows.probe_taps, layer)

    def cut_states(self, layer: int) -> Tensor:
        """Hidden states of `layer` at the last token of every probed prefix [K, H] float32."""
        return self._states(self.rows.cut_taps, layer)

    def _states(self, taps: Tensor | None, layer: int) -> Tensor:
        if taps is None or layer not in self.layers:
            raise JudgeError(
                f"a judge reads hidden layer {layer}, but the session shows {list(self.layers)}. Open it with "
                "judging_session(target, judge)."
            )
        return taps[:, self.layers.index(layer)].float()


@dataclass(frozen=True, kw_only=True)
class PassJudge(ABC):
    """Base of the judges whose scores can be read off one pass of the target, which others may read, too.

    A judge of one's own is a class derived from it with a `read`, and with a `bind` where it has to know the target:

        class Short(PassJudge):
            def read(self, reading):
                return [float(len(text) < 200) for text in reading.texts]

    suffix  rows appended behind every probed prefix; none: the draft is read as it stands, without a mask
    chosen  the path of the pass; None: not bound yet
    reason  why it is not the packed one, where a suffix is asked for
    card    the thresholds of its scores on this target, where they are known
    """

    # Filled in by bind:
    suffix: tuple[int, ...] = ()
    chosen: JudgePath | None = None
    reason: str | None = None
    card: Thresholds | None = None

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target` whose pass is chosen: a causal one without a suffix, else packed where that works.

        Raises IncompatibleStack for a target that cannot make it.
        """
        if isinstance(target, RemoteModel) and self.wanted is None:
            raise IncompatibleStack(
                f"{type(self).__name__} may look at all logits, and {target.name} shows only some. Give it a property "
                "`wanted` with the ids whose logits it reads, () for none, or use engine=local."
            )
        path = choose_path(target, self.suffix, "auto") if self.suffix else (JudgePath.CAUSAL, None)
        bound = copy.copy(self)  # not `replace`: a class of the user's may have a constructor of its own
        for name, value in zip(("chosen", "reason"), path, strict=True):
            object.__setattr__(bound, name, value)
        return bound

    @abstractmethod
    def read(self, reading: Reading) -> Tensor | Sequence[float]:
        """A score in [0, 1] per probe [K], off a pass with this judge's suffix."""

    @property
    def needs(self) -> JudgeNeeds:
        return JudgeNeeds()

    @property
    def wanted(self) -> tuple[int, ...] | None:
        """Ids whose logits `read` looks at, the one that speaks most for the draft first; None: it may look at all,
        which no server shows."""
        return None

    @property
    def suffix_rows(self) -> int:
        return len(self.suffix)

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        reading = Reading.take(
            session, draft, cuts, probes, suffix=self.suffix, path=self.bound_path, wanted=self.wanted
        )
        return scores_of(self.checked(reading), [reading], self.reason)

    def checked(self, reading: Reading) -> Tensor:
        """What `read` returns as float64 on the host [K]. Raises JudgeError where that is not a score per probe."""
        name, given, count = f"{type(self).__name__}.read", self.read(reading), len(reading.probes)
        try:
            values = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise JudgeError(
                f"{name} gave {shown(given)}; expected a score for each of {count} prefixes: a tensor [{count}] or a "
                f"list of {count} numbers."
            ) from error
        values = values.detach().cpu().double()
        if values.numel() != count or values.squeeze().dim() > 1:
            raise JudgeError(
                f"{name} gave values of shape {list(values.shape)} for {count} prefixes; expected one for each, a "
                f"tensor [{count}] or a list of {count} numbers."
            )
        if (outside := values[(values < -ROUNDING) | (values > 1 + ROUNDING)]).numel():
            raise JudgeError(
                f"{name} gave the score {outside.flatten()[0].item():g}; expected {SCORE}. torch.sigmoid makes one of "
                "a logit, exp of a log-probability."
            )
        return values.reshape(count).clamp(0, 1)

    @property
    def bound_path(self) -> JudgePath:
        if self.chosen is None and self.suffix:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        return self.chosen or JudgePath.CAUSAL


def scores_of(values: Tensor, readings: Sequence[Reading], note: str | None) -> Scores:
    """`values` [K] with what the passes they came from tell besides; refuses what is no number."""
    last = readings[-1].rows
    if not bool(values.isfinite().all()):
        raise JudgeError(
            f"the scores of a draft of {len(last.draft_logprobs)} tokens are not all numbers (nan). If they come from "
            "the target's logits, these overflow in their dtype: use dtype=bfloat16 or float32 for the target."
        )
    rows = sum(reading.rows.rows for reading in readings)
    return Scores(tuple(values.tolist()), tuple(last.draft_logprobs.tolist()), rows, readings[0].rows.path, note)


def check_path(path: str) -> None:
    """Refuse a `path` setting that does not exist."""
    if path not in ("auto", "packed", "forked"):
        raise ConfigError(f"judge.path='{path}'; expected auto, packed or forked.")


def check_here(target: LanguageModel, judge: str, reads: str) -> None:
    """Refuse a judge that reads what a server keeps."""
    if isinstance(target, RemoteModel):
        raise IncompatibleStack(
            f"judge={judge} reads {reads}, and {target.name} does not show them. Use judge=label or judge=digit, or "
            "engine=local."
        )


def check_labels(target: LanguageModel, judge: str, labels: Sequence[int]) -> None:
    """Refuse a pass that compares more labels than a server's way of showing them has room for."""
    if isinstance(target, RemoteModel) and target.can.labels is Labels.SCORING and len(labels) > 2:
        raise IncompatibleStack(
            f"judge={judge} compares {len(labels)} labels in one pass, and labels=generative_scoring of {target.name} "
            "scores one against another. Use labels=auto, or judge=label."
        )


def choose_path(target: LanguageModel, suffix: tuple[int, ...], wanted: str) -> tuple[JudgePath, str | None]:
    """How probes with `suffix` run on `target`, and why not packed. `wanted`: auto, packed or forked."""
    if len(suffix) + 2 > target.context_limit:  # a prompt and a draft of one token each
        raise IncompatibleStack(
            f"the judge's question takes {len(suffix)} tokens, chat turns included, and the context of {target.name} "
            f"holds {target.context_limit}, so no draft could be judged. Ask a shorter one (judge.question), or "
            "give the target a larger context_limit, if it was lowered."
        )
    if isinstance(target, RemoteModel):
        if target.judge_obstacle:
            raise IncompatibleStack(f"the judge cannot run on {target.judge_obstacle}. Use outer=none.")
        if wanted != "auto":
            raise IncompatibleStack(
                f"judge.path={wanted}, but the probes of {target.name} go to a server as prompts. Use judge.path=auto."
            )
        return JudgePath.REMOTE, None
    problem = target.mask_obstacle or probe_error(target, suffix, JudgePath.PACKED)
    if wanted == "packed" and problem:
        raise IncompatibleStack(f"judge.path=packed, but {target.name} has {problem}. Use judge.path=auto.")
    if wanted != "forked" and not problem:
        return JudgePath.PACKED, None
    if failure := probe_error(target, suffix, JudgePath.FORKED):
        raise IncompatibleStack(
            f"the judge cannot run on {target.name}: packed, {problem}; forked, {failure}. Use outer=none."
        )
    if problem:
        log.warning("judge runs as a forked batch on %s: %s", target.name, problem)
    return JudgePath.FORKED, problem
