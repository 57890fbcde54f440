"""The interface between an outer level and a judge, and the base of the judges that read one pass of the target.

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
ROUNDING = 1e-4  # scores outside [0, 1] by no more than this count as 0 or 1


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the probed cuts, in order, and what else the same pass gave.

    values          one score in [0, 1] per probe
    draft_logprobs  the target's log-probability of every draft token, in nats
    """

    values: tuple[float, ...]
    draft_logprobs: tuple[float, ...]
    rows: int
    path: JudgePath
    note: str | None = None  # e.g. why the path is not the packed one


def judged(judge: Judge, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
    """The judge's scores, checked to be one per probe: an outer level could not tell which ones are missing.

    Raises JudgeError if the judge returns anything else.
    """
    scores, name = judge.score(session, draft, cuts, probes), type(judge).__name__
    if not isinstance(scores, Scores):
        raise JudgeError(
            f"{name}.score gave {shown(scores)}; expected parsedec.judge.Scores(values=…, draft_logprobs=…, rows=…, "
            "path=…). A judge derived from PassJudge makes them from what its `read` returns."
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

    hidden_layers   layers of the target, indexed as in `output_hidden_states`, which its session has to record
    draft_logprobs  the draft model's log-probabilities of its own tokens, `Draft.logprobs`
    """

    hidden_layers: tuple[int, ...] = ()
    draft_logprobs: bool = False

    def __post_init__(self) -> None:  # accept a list as well
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))


class Judge(Protocol):
    """Scores how likely the answer is free of errors up to each cut."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; raises if the two do not fit."""

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        """Scores of `probes`, a subset of `cuts`; leaves the draft staged in `session`, which must record what
        `judging_session` would."""

    @property
    def needs(self) -> JudgeNeeds:
        """What sessions and drafts must hold for it; known once it is bound."""

    @property
    def suffix_rows(self) -> int:
        """Rows per probe."""

    @property
    def card(self) -> Thresholds | None:
        """The thresholds calibrated for its scores on this target, if there are any."""


def judging_session(target: LanguageModel, judge: Judge) -> Session:
    """A new session of `target` that records what the bound `judge` reads. The engine opens its own the same way, but
    with the inner speculator's hidden states first."""
    return open_session(target, judge.needs.hidden_layers)


@dataclass(frozen=True, slots=True)
class Reading:
    """One judge pass, as judges read it.

    cuts    all cuts of the draft, as token positions; `probes` are those to score
    rows    what the target computed: logits, log-probabilities, hidden states
    layers  layers of the L taps of `rows`, indexed as in `output_hidden_states`
    before  the target's tokens before the draft: the prompt, and the answer of earlier rounds
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
        """Make the pass, and leave the draft staged. `wanted`: ids whose logits are read, as in `Session.judge`."""
        rows = session.judge(draft.tokens, cuts, suffix, probes=probes, path=path, wanted=wanted)
        return cls(draft, cuts, probes, rows, session.taps, session.tokens, session.model)

    @property
    def texts(self) -> list[str]:
        """The text of every probed prefix of the draft [K], for judges that read text."""
        return [self.draft.piece(0, probe) for probe in self.probes]

    @property
    def context(self) -> str:
        """The text before the draft, with chat turns as the target reads them, for judges that need the question. In
        later rounds it ends with the answer so far."""
        return self.model.decode(self.before, special=True)

    def probe_states(self, layer: int) -> Tensor:
        """Hidden states of `layer` at every probe's last row [K, H] float32; without a suffix, at the cut's row."""
        return self._states(self.rows.probe_taps, layer)

    def cut_states(self, layer: int) -> Tensor:
        """Hidden states of `layer` at the last token of every probed prefix [K, H] float32."""
        return self._states(self.rows.cut_taps, layer)

    def _states(self, taps: Tensor | None, layer: int) -> Tensor:
        if taps is None or layer not in self.layers:
            raise JudgeError(
                f"a judge reads hidden layer {layer}, but the session records {list(self.layers)}. Open it with "
                "judging_session(target, judge)."
            )
        return taps[:, self.layers.index(layer)].float()


@dataclass(frozen=True, kw_only=True)
class PassJudge(ABC):
    """Base of the judges whose scores are read off one pass of the target, which other judges may read as well.

    To write your own judge, derive a class and define `read`, and also `bind` if it has to know the target:

        class Short(PassJudge):
            def read(self, reading):
                return [float(len(text) < 200) for text in reading.texts]

    suffix  tokens appended to every probed prefix; none: the draft is read as it is, without a mask
    chosen  the path of the pass; None: not bound yet
    reason  why that is not the packed path, if there is a suffix
    card    the thresholds for its scores on this target, if known
    """

    # Set by `bind`:
    suffix: tuple[int, ...] = ()
    chosen: JudgePath | None = None
    reason: str | None = None
    card: Thresholds | None = None

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target` with its path chosen: causal without a suffix, else packed where that works.

        Raises IncompatibleStack for a target that cannot make the pass.
        """
        if isinstance(target, RemoteModel) and self.wanted is None:
            raise IncompatibleStack(
                f"{type(self).__name__} may read any logits, but {target.name} shows only some. Give it a property "
                "`wanted` with the ids whose logits it reads, () for none, or use engine=local."
            )
        path = choose_path(target, self.suffix, "auto") if self.suffix else (JudgePath.CAUSAL, None)
        bound = copy.copy(self)  # not `replace`, since a user's class may have a constructor of its own
        for name, value in zip(("chosen", "reason"), path, strict=True):
            object.__setattr__(bound, name, value)
        return bound

    @abstractmethod
    def read(self, reading: Reading) -> Tensor | Sequence[float]:
        """A score in [0, 1] per probe [K], from a pass with this judge's suffix."""

    @property
    def needs(self) -> JudgeNeeds:
        return JudgeNeeds()

    @property
    def wanted(self) -> tuple[int, ...] | None:
        """Ids whose logits `read` uses, the one most in favour of the draft first; None: it may use any, and no server
        shows all."""
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
        """What `read` returns, as float64 on the host [K]. Raises JudgeError if that is not one score per probe."""
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
                f"{name} gave the score {outside.flatten()[0].item():g}; expected {SCORE}. torch.sigmoid turns a "
                "logit into one, exp a log-probability."
            )
        return values.reshape(count).clamp(0, 1)

    @property
    def bound_path(self) -> JudgePath:
        if self.chosen is None and self.suffix:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        return self.chosen or JudgePath.CAUSAL


def scores_of(values: Tensor, readings: Sequence[Reading], note: str | None) -> Scores:
    """`values` [K] with what else their passes gave; raises JudgeError if they are not all numbers."""
    last = readings[-1].rows
    if not bool(values.isfinite().all()):
        raise JudgeError(
            f"the scores of a draft of {len(last.draft_logprobs)} tokens are not all numbers (nan). If they come from "
            "the target's logits, these overflow in their dtype: use dtype=bfloat16 or float32 for the target."
        )
    rows = sum(reading.rows.rows for reading in readings)
    return Scores(tuple(values.tolist()), tuple(last.draft_logprobs.tolist()), rows, readings[0].rows.path, note)


def check_path(path: str) -> None:
    """Raise ConfigError for a `path` setting that does not exist."""
    if path not in ("auto", "packed", "forked"):
        raise ConfigError(f"judge.path='{path}'; expected auto, packed or forked.")


def check_here(target: LanguageModel, judge: str, reads: str) -> None:
    """Raise IncompatibleStack if the target is on a server, for a judge that reads what servers do not show."""
    if isinstance(target, RemoteModel):
        raise IncompatibleStack(
            f"judge={judge} reads {reads}, but {target.name} does not show them. Use judge=label or judge=digit, or "
            "engine=local."
        )


def check_labels(target: LanguageModel, judge: str, labels: Sequence[int]) -> None:
    """Raise IncompatibleStack for a pass that compares more labels than the server can score at once."""
    if isinstance(target, RemoteModel) and target.can.labels is Labels.SCORING and len(labels) > 2:
        raise IncompatibleStack(
            f"judge={judge} compares {len(labels)} labels in one pass, but labels=generative_scoring of {target.name} "
            "scores only one against another. Use labels=auto, or judge=label."
        )


def choose_path(target: LanguageModel, suffix: tuple[int, ...], wanted: str) -> tuple[JudgePath, str | None]:
    """The path on which probes with `suffix` run on `target`, and why that is not the packed one. `wanted`: auto,
    packed or forked. Raises IncompatibleStack if there is none."""
    if len(suffix) + 2 > target.context_limit:  # a prompt and a draft of one token each
        raise IncompatibleStack(
            f"the judge's question takes {len(suffix)} tokens, chat turns included, and the context of {target.name} "
            f"holds {target.context_limit}, so no draft could be judged. Ask a shorter question (judge.question), or "
            "raise the target's context_limit, if it was lowered."
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
