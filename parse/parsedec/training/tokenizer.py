"""The tokenizer of the zoo: byte-level BPE, learnt from the problems and solutions of its tasks.

It can encode any text. Every digit is a token of its own, so that a number looks alike wherever it occurs; the judge's
labels are one token each.

output/tokenizer/    tokenizer.json, tokenizer_config.json and judge.json, as AutoTokenizer and `tokenizer_of` read them
output/record.json   configuration, provenance, and how many tokens held-out texts take
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from parsedec.errors import ConfigError, require_number
from parsedec.experiment.build import plain
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, write_record
from parsedec.models.language_model import JudgeCard, load
from parsedec.tasks.base import Problem
from parsedec.tasks.zoo_base import ZooTask
from parsedec.training.answers import Solution
from parsedec.training.export import export_card

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
QUESTION, LABELS = "<|verify|>", ("Correct", "Incorrect")
SPECIAL = (PAD, USER, ASSISTANT, END, QUESTION, *LABELS)  # in the order of their ids, from 0
BYTES = 256
TEMPLATE = (
    f"{{% for m in messages %}}{{{{ '{USER}' if m['role'] == 'user' else '{ASSISTANT}' }}}}{{{{ m['content'] }}}}"
    f"{{% if m['role'] == 'assistant' %}}{END}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
# thresholds of a judge that has learnt nothing yet; a recipe that trains one calibrates them
CARD = JudgeCard(question=QUESTION, labels=LABELS, threshold=0.5, full_threshold=0.5)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts of one task: its problems, and answers to them.

    task       gives the problems
    solution   writes the answers
    answers    how many differently worded answers to each problem
    held_out   how many problems of the split `test` the record's figures are measured on
    """

    task: ZooTask
    solution: Solution
    answers: int = 2
    held_out: int = 200

    def __post_init__(self) -> None:
        require_number("answers", self.answers, whole=True, low=1)
        require_number("held_out", self.held_out, whole=True, low=1)

    def texts(self, rng: random.Random) -> Iterator[str]:
        for problem in self.task.problems():
            yield problem.prompt
            for _ in range(self.answers):
                yield self._answer(problem, rng)

    def figures(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict[str, Any]:
        """How many tokens held-out problems and answers take, and how many texts change when encoded and decoded."""
        problems = replace(self.task, split="test", n=self.held_out).problems()
        prompts, answers = [p.prompt for p in problems], [self._answer(p, rng) for p in problems]
        coded = {text: tokenizer.encode(text, add_special_tokens=False) for text in (*prompts, *answers)}
        return {
            "problems": len(problems),
            "tokens_per_prompt": fmean(len(coded[text]) for text in prompts),
            "tokens_per_answer": fmean(len(coded[text]) for text in answers),
            "characters_per_token": sum(map(len, coded)) / sum(map(len, coded.values())),
            "changed_by_round_trip": sum(tokenizer.decode(ids) != text for text, ids in coded.items()),
        }

    def _answer(self, problem: Problem, rng: random.Random) -> str:
        return "\n".join(self.solution(problem, rng))


def train_tokenizer(cfg: DictConfig) -> dict[str, Any]:
    """Learn a tokenizer from `cfg.corpus`, write it and its record (`conf/tokenizer.yaml`), and return the record."""
    folder, config = Path(cfg.output), plain(cfg)
    earlier_record(folder / "record.json", config, resume=None)
    corpora: dict[str, Corpus] = {str(name): instantiate(node) for name, node in cfg.corpus.items()}
    tokenizer = learn(texts(corpora, cfg.seed), cfg.vocabulary)
    save(tokenizer, folder / "tokenizer")
    figures = {
        name: corpus.figures(tokenizer, random.Random(f"{cfg.seed}/held out/{name}"))
        for name, corpus in corpora.items()
    }
    record = {
        "schema_version": SCHEMA_VERSION,
        "title": cfg.title,
        "config": config,
        "provenance": provenance(),
        "status": "finished",
        "vocabulary": len(tokenizer),
        "evaluation": figures,
    }
    write_record(record, folder / "record.json")
    return record


def texts(corpora: Mapping[str, Corpus], seed: int) -> Iterator[str]:
    """Every text of every corpus. The texts of a corpus do not depend on the other corpora."""
    if not corpora:
        raise ConfigError("corpus is empty; expected at least one task to take text from. Leave one in.")
    for name, corpus in corpora.items():
        yield from corpus.texts(random.Random(f"{seed}/{name}"))


def learn(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary` tokens: special ones, all bytes, and what `corpus` repeats most.

    Raises ConfigError if the corpus repeats too little to fill it.
    """
    require_number("vocabulary", vocabulary, whole=True, low=len(SPECIAL) + BYTES)
    raw = Tokenizer(models.BPE())
    # digits are split off first, so that no learnt token can contain one
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    if raw.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"vocabulary={vocabulary}, but the corpus repeats too little to fill it: {raw.get_vocab_size()} tokens. "
            "Lower vocabulary, or add problems to the corpus."
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write tokenizer and judge card to `folder`, as beside an exported model; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # the template goes into tokenizer_config.json, as in `export`
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    export_card(CARD, folder)
    return folder


def tokenizer_of(source: str) -> tuple[PreTrainedTokenizerBase, JudgeCard | None]:
    """Tokenizer and judge card of a model (`source` as for `load`), or of a folder that `save` wrote."""
    folder = Path(source).expanduser()
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists():
        card = json.loads((folder / "judge.json").read_text())
        return AutoTokenizer.from_pretrained(folder), JudgeCard(**{**card, "labels": tuple(card["labels"])})
    model = load(source, device="cpu")
    return model.tokenizer, model.judge_card
