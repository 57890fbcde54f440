"""Recipes for heads: an inner speculator's weights, distilled from a target's own answers.

The target first answers the recipe's problems. In every training step it then reads some of these answers again, and
shows the head what it would see while guessing (hidden states and tokens) and what it should have guessed: the target's
own distribution over the next token at every later position. The target may be any attention model that can be loaded.

    loss = sum over depths d of decay^(d-1) · mean CE(target's distribution, guess made d tokens ahead)

output/answers.json   the target's answers (kept for resuming)
output/model/         the head in its public checkpoint layout

Shapes in this file:  B texts, T positions, L taps, H hidden, M guesses, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.experiment.summary import resampled, sum_by_depth
from parsedec.models.language_model import LanguageModel, load
from parsedec.tasks.base import Problem
from parsedec.tasks.jsonl import read_prompts
from parsedec.text.chat import closing_token
from parsedec.training.drafts import Pool, load_or_sample
from parsedec.training.generation import prompts
from parsedec.training.loop import Loss, Schedule, check_output
from parsedec.types import Counters


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts with the target's answers, and the hidden states of the target reading them.

    ids      [B, T] padded at the end
    answers  [B, T] whether the token after a position belongs to the answer (its end token included)
    taps     [B, T, L, H] hidden states the head asked for
    """

    ids: Tensor
    answers: Tensor
    taps: Tensor


@dataclass(frozen=True, slots=True)
class Guess:
    """Guesses that a head makes a given number of tokens ahead.

    depth    1 for the token that comes right after the speculator's root
    logits   [M, V] or, with `columns`, [M, len(columns)]
    rows     [M] flat positions b * T + t whose next token is guessed
    columns  target ids of the logits' columns; None: the whole vocabulary
    """

    depth: int
    logits: Tensor
    rows: Tensor
    columns: Tensor | None = None


class Head(Protocol):
    """A speculator's weights in training."""

    layers: tuple[int, ...]
    """Hidden states it reads, as in `output_hidden_states`."""

    module: nn.Module
    """What is trained."""

    def guesses(self, texts: Texts) -> Iterator[Guess]:
        """All guesses about the answers, with a gradient, depth by depth."""

    def save(self, folder: Path) -> None:
        """Write the checkpoint that the speculator's loader reads, in the module's dtype."""


class Distillation:
    """The objective of heads."""

    def __init__(self, target: LanguageModel, head: Head, *, decay: float, autocast: bool = True) -> None:
        if not 0 < decay <= 1:
            raise ConfigError(f"recipe.decay={decay}; expected above 0 and at most 1.")
        check_output(target)
        self.target = target
        self.head = head
        self.decay = decay
        self.autocast = autocast
        self.trained = head.module
        self.helpers: nn.Module = nn.Module()
        target.hf.requires_grad_(False)

    def losses(self, batch: tuple[Tensor, Tensor]) -> Iterator[Loss]:
        device = self.target.device
        ids, answers = (part.to(device) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            hidden, taps = self._read(ids)
            for guess in self.head.guesses(Texts(ids, answers, taps)):
                yield self._loss(guess, hidden.flatten(0, 1)[guess.rows])

    @torch.no_grad()
    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The target's last hidden states [B, T, H] and the taps. No mask is needed, since padding comes last."""
        out = self.target.hf.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
        layers = [out.hidden_states[layer] for layer in self.head.layers]
        none = out.last_hidden_state.new_empty(*ids.shape, 0, self.target.hidden_size)
        return out.last_hidden_state, torch.stack(layers, dim=2) if layers else none

    def _loss(self, guess: Guess, hidden: Tensor) -> Loss:
        with torch.no_grad():
            logits = self.target.hf.get_output_embeddings()(hidden).float()  # [M, V]
            teacher = (logits if guess.columns is None else logits[:, guess.columns]).softmax(-1)
        likely = guess.logits.float().log_softmax(-1)
        best = guess.logits.argmax(-1)
        best = best if guess.columns is None else guess.columns[best]
        hits = (best == logits.argmax(-1)).sum()
        total = -(teacher * likely).sum()
        return Loss(f"depth_{guess.depth}", self.decay ** (guess.depth - 1), total, hits, len(guess.rows))


@dataclass(frozen=True, kw_only=True)
class TextBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batch number `step`: (ids [B, T], answers [B, T]), a pure function of (seed, step).

    positions  about how many positions a batch has, padding included
    Raises ConfigError if the pool is empty.
    """

    contexts: Sequence[Sequence[int]]
    pool: Pool
    end_id: int
    pad_id: int
    positions: int
    seed: int
    # context with answer and end token, and the length of the context
    _by_length: list[tuple[list[int], int]] = field(init=False)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed}/{step}")
        # a random text and others of about its length, so that there is little padding
        middle = rng.randrange(len(self._by_length))
        texts = [self._by_length[middle]]
        reach = max(1, self.positions // len(texts[0][0]))
        low = max(0, min(middle - reach, len(self._by_length) - 2 * reach - 1))
        texts += rng.sample(self._by_length[low : low + 2 * reach + 1], min(reach - 1, len(self._by_length)))
        longest = max(len(ids) for ids, _ in texts)
        ids = torch.full((len(texts), longest), self.pad_id)
        answers = torch.zeros(len(texts), longest, dtype=torch.bool)
        for row, (tokens, start) in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            answers[row, start - 1 : len(tokens) - 1] = True
        return ids, answers

    def __post_init__(self) -> None:
        texts = [
            ([*context, *answer, *([self.end_id] if ended else [])], len(context))
            for context, answers in zip(self.contexts, self.pool, strict=True)
            for answer, ended in answers
        ]
        if not texts:
            raise ConfigError("the target wrote no answer to learn from. Ask it other problems (recipe.task).")
        object.__setattr__(self, "_by_length", sorted(texts, key=lambda text: len(text[0])))


class HeadJob:
    """kind=head: weights of an inner speculator."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        recipe, preset = cfg.recipe, cfg.preset
        self.cfg = cfg
        self.folder = folder
        target = load(recipe.target, dtype="float32", device=preset.device, attention=preset.attention)
        problems, self.unseen = problems_of(recipe)
        contexts = prompts(target, problems)
        prompts(target, self.unseen)  # what the evaluation could not ask is refused now, not after the training
        pool = load_or_sample(
            folder / "answers.json",
            target,
            problems,
            [instantiate(one) for one in recipe.answers],
            max_new_tokens=recipe.max_new_tokens,
            batch=preset.generation_batch,
            seed=cfg.seed,
        )
        self.texts = TextBatches(
            contexts=contexts,
            pool=pool,
            end_id=closing_token(target),
            pad_id=target.tokenizer.pad_token_id or 0,
            positions=recipe.positions,
            seed=cfg.seed,
        )
        torch.manual_seed(cfg.seed)  # heads draw from the global generator while they learn
        self.head: Head = instantiate(recipe.head, _partial_=True)(target=target, answers=pool, seed=cfg.seed)
        self.schedule: Schedule = instantiate(recipe.optimisation)
        self.objective = Distillation(target, self.head, decay=recipe.decay, autocast=preset.autocast)

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.texts,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.cfg.preset.workers,
            generator=torch.Generator(),  # of its own: drawing from the global one would shift a resumed run
        )
        yield from loader

    def finish(self) -> dict[str, Any]:
        self.head.module.to(torch.bfloat16)  # the precision it ships in; the checkpoint beside it keeps float32
        self.head.save(self.folder / "model")
        return {"evaluation": acceptance(self.cfg, self.folder / "model", self.unseen)}


def problems_of(recipe: DictConfig) -> tuple[list[Problem], list[Problem]]:
    """The problems to learn from, and those the head is measured on: of two tasks, or of one file of prompts.

    Raises ConfigError if `evaluation.held_out` leaves none of the file's prompts for either.
    """
    if recipe.prompts is None:
        return instantiate(recipe.task).problems(), instantiate(recipe.evaluation.task).problems()
    problems = read_prompts(recipe.prompts)
    if not 1 <= recipe.evaluation.held_out < len(problems):
        raise ConfigError(
            f"recipe.evaluation.held_out={recipe.evaluation.held_out} of the {len(problems)} prompts in "
            f"{recipe.prompts}; expected at least 1, and fewer than there are."
        )
    return problems[: -recipe.evaluation.held_out], problems[-recipe.evaluation.held_out :]


def acceptance(cfg: DictConfig, folder: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """Mean tokens per target call (tau) of the exported head on unseen problems, in the engine's own loop.

    tau counts accepted guesses and the token that every call yields besides, as the papers on EAGLE and Medusa do.
    The interval is a 95 % bootstrap over problems.
    """
    recipe = cfg.recipe
    target = load(recipe.target, dtype="float32", device=cfg.preset.device)
    speculator = instantiate(recipe.evaluation.speculator)(**{recipe.evaluation.weights: str(folder)})
    engine = Parse(target, inner=speculator)
    counters = [engine.generate(problem.prompt, max_new_tokens=recipe.max_new_tokens).counters for problem in problems]
    offered, accepted = (
        sum_by_depth([getattr(one, name) for one in counters]) for name in ("offered_by_depth", "accepted_by_depth")
    )
    return {
        "problems": len(problems),
        "target_calls": sum(one.inner_steps for one in counters),
        **_tau(counters, cfg.seed),
        "offered_by_depth": offered,
        "accepted_by_depth": accepted,
    }


def _tau(counters: Sequence[Counters], seed: int) -> dict[str, Any]:
    """Nothing where no answer was longer than the token of the prefill: then nothing was guessed."""
    verified = [one for one in counters if one.inner_steps]
    if not verified:
        return {}
    steps = np.array([one.inner_steps for one in verified])
    tokens = steps + np.array([sum(one.accepted_by_depth) for one in verified])
    draws = resampled(len(steps), seed)
    samples = tokens[draws].sum(1) / steps[draws].sum(1)
    return {
        "tau": float(tokens.sum() / steps.sum()),
        "tau_interval": [float(x) for x in np.percentile(samples, [2.5, 97.5])],
    }
