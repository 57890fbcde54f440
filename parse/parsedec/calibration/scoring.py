"""Turn a question into a judged sample: the draft model writes, the segmenter cuts, the judge scores, as in the engine.

This needs only `Judge.bind` and `Judge.score`, so every judge can be calibrated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.calibration.samples import Sample
from parsedec.calibration.sources import Answers, Question, Source, Steps, right
from parsedec.engine import Parse
from parsedec.errors import ConfigError, ParsedecError, PromptError
from parsedec.experiment.build import build_engine, build_sampling, build_target
from parsedec.experiment.nodes import check_local
from parsedec.judge import judging_session
from parsedec.models.language_model import LanguageModel
from parsedec.outer import DraftVerification, TargetOnly
from parsedec.sampling import Sampler, request_generator
from parsedec.text.chat import prompt_ids
from parsedec.text.spelling import Draft
from parsedec.types import Limits

log = logging.getLogger(__name__)


class Scorer:
    """Judges drafts of questions, and lets the target go on from kept prefixes.

    Raises ConfigError or IncompatibleStack for a configuration that has nothing to calibrate, or that `source` does
    not fit.
    """

    def __init__(self, cfg: DictConfig, source: Source) -> None:
        outer = instantiate(cfg.outer)
        if not isinstance(outer, DraftVerification):
            raise ConfigError(
                f"outer is {type(outer).__name__}, which has no thresholds to calibrate; expected outer=parse or "
                "outer=parse_streamed."
            )
        self.source = source
        self.limits = Limits(max_new_tokens=cfg.max_new_tokens, stop=cfg.stop)
        self.sampling = build_sampling(cfg)
        self.seed = int(cfg.seed)
        if not source.prefixes and not self.sampling.greedy:
            raise ConfigError(
                f"sampling.temperature={self.sampling.temperature}, but labels=answers compares what the target writes "
                "with and without a kept prefix, which takes greedy decoding. Set sampling.temperature=0."
            )
        check_local(cfg)
        self.engine: Parse | None = None
        self.target: LanguageModel = build_target(cfg)
        if source.drafts:
            self.engine = build_engine(cfg)
            bound = self.engine.outer
            assert isinstance(bound, DraftVerification)
            self.outer: DraftVerification = bound
            self.alone = Parse(
                self.target, inner=instantiate(cfg.inner), acceptance=self.engine.acceptance, outer=TargetOnly()
            )
        else:
            self.outer = outer.bind(self.target)
            if self.outer.judge.needs.draft_logprobs:
                raise ConfigError(
                    f"{type(self.outer.judge).__name__} reads the draft model's probabilities of its own tokens, and "
                    "labelled steps were written by no draft model. Use another judge, or labels=checker or answers."
                )

    def sample(self, question: Question, index: int) -> Sample:
        """The question's draft, judged. If it cannot be (too long, say), the sample's `error` says why."""
        problem = question.problem
        try:
            prompt = self.prompt(problem.prompt)
            if isinstance(self.source, Steps):
                draft, cuts, labels = self.source.draft(self.target, problem)
                right: tuple[bool, ...] | None = tuple(labels)
                correct = labels[-1]
            else:
                assert isinstance(self.source, Answers)
                draft = self._draft(problem.prompt, prompt, index)
                cuts = self.outer.segmenter.cuts(draft)
                right, correct = self.source.label(question, draft, cuts)
            return Sample(
                part=question.part,
                id=problem.id,
                tokens=draft.tokens,
                text=draft.text,
                ended=draft.ended,
                cuts=tuple(cuts),
                scores=self._scores(prompt, draft, cuts),
                right=right,
                correct=correct,
            )
        except PromptError as error:
            log.warning("%s is left out: %s", problem.id, error)
            return Sample(part=question.part, id=problem.id, error=str(error))

    def prompt(self, text: str) -> list[int]:
        """The problem as the target's prompt, in tokens."""
        return prompt_ids(self.target, [{"role": "user", "content": text}])

    @torch.inference_mode()
    def answer(self, question: Question, tokens: Sequence[int]) -> bool:
        """Whether the target, going on from `tokens`, the first ones of a draft, ends with a right answer."""
        left = self.limits.max_new_tokens - len(tokens)
        written = list(tokens)
        if left > 0:
            ids = [*self.prompt(question.problem.prompt), *tokens]
            try:
                result = self.alone.generate(ids, max_new_tokens=left, stop=self.limits.stop)
            except ParsedecError as error:
                log.warning("%s: the target cannot go on: %s", question.problem.id, error)
                return False
            written += [token for token in result.tokens if token not in self.target.end_ids]
        text = self.target.decode(written)
        ends = [text.find(stop) for stop in self.limits.stop if stop in text]
        return right(question.task, question.problem, text[: min(ends, default=len(text))])

    @torch.inference_mode()
    def _draft(self, text: str, prompt: list[int], index: int) -> Draft:
        """The draft that the outer level would get from the draft model, in the target's tokens."""
        assert self.engine is not None
        sampler = Sampler(self.sampling, request_generator(self.seed, index))
        return self.engine.write_draft(text, prompt, sampler, self.limits)

    @torch.inference_mode()
    def _scores(self, prompt: list[int], draft: Draft, cuts: Sequence[int]) -> tuple[float, ...]:
        if not cuts:
            return ()
        session = judging_session(self.target, self.outer.judge)
        session.feed(prompt)
        return self.outer.judge.score(session, draft, cuts, cuts).values
