"""A draft judged piece by piece equals the same draft judged in one pass, and its cuts are those of the finished draft.

Oracles: one judge pass over the whole draft, plain forwards, and the segmenter's cuts of the finished text.
"""

import itertools
import random
import string

import pytest
import torch

import tiny
from parsedec.segmenters import CodeStatements, EveryTokens, Lines, Paragraphs, Sentences
from parsedec.sessions.session import Session
from parsedec.text.spelling import Draft
from parsedec.types import JudgePath

GENERATOR = torch.Generator().manual_seed(11)
PROMPT = torch.randint(5, tiny.VOCAB, (20,), generator=GENERATOR).tolist()
DRAFT = torch.randint(5, tiny.VOCAB, (17,), generator=GENERATOR).tolist()
CUTS = [2, 3, 8, 12, 17]
SUFFIX = [1, 2, 7, 1, 3]
SPLITS = [([4, 1], 17), ([2, 1, 2], 0), ([1] * 5, 3), ([1, 4], 12)]  # cuts judged by each pass, and the cut kept


@pytest.mark.parametrize(
    ("family", "lead"), [*((family, "read") for family in tiny.FAMILIES), ("llama", "pending"), ("lfm2", "pending")]
)
def test_judging_a_growing_draft_equals_one_pass(family, lead):
    """Same probe logits, log-probabilities, logits at the cuts and taps, in any split; every draft row is read once."""
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    for split, keep in SPLITS:
        whole, session = started(model, lead), started(model, lead)
        expected = whole.judge(DRAFT, CUTS, SUFFIX, path=path)
        before, logits, done = session.rows, [], 0
        for count in split:
            known = CUTS[: done + count]
            rows = session.judge(DRAFT[: known[-1]], known, SUFFIX, probes=known[done:], path=path)
            logits.append(rows.probe_logits)
            done += count
        close(torch.cat(logits), expected.probe_logits)
        close(rows.draft_logprobs, expected.draft_logprobs)
        assert session.rows - before == len(DRAFT) + len(CUTS) * len(SUFFIX) + (lead == "pending")
        for one in (whole, session):
            one.keep_draft(keep)
        assert session.tokens == whole.tokens == PROMPT + DRAFT[:keep]
        close(session.feed([]), whole.feed([]))
        close(session.feed([9, 11]), whole.feed([9, 11]))
        if session.taps:
            close(session.seen(0).taps, whole.seen(0).taps)


@pytest.mark.parametrize("path", [JudgePath.PACKED, JudgePath.FORKED])
def test_rows_whose_logits_are_gone_are_read_again(tiny_target, path):
    session = started(tiny_target, "read")
    session.judge(DRAFT[:8], [8], SUFFIX, path=path)
    rows = session.judge(DRAFT, CUTS, SUFFIX, path=path)  # cuts 2 and 3 were not said before
    assert rows.rows == len(DRAFT) + len(CUTS) * len(SUFFIX)
    close(rows.probe_logits, started(tiny_target, "read").judge(DRAFT, CUTS, SUFFIX, path=path).probe_logits)
    other = [DRAFT[0] + 1, *DRAFT[1:], 9]  # no continuation of what is staged
    assert session.judge(other, [18], SUFFIX, path=path).rows == 18 + len(SUFFIX)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "mamba2"])
def test_random_walks_with_growing_drafts(family):
    """Judging on, dropping, keeping, feeding and rewinding in any order leave what a plain forward has."""
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    for seed in range(3):
        rng = random.Random(f"{family}{seed}")
        session, expected = Session(model), list(PROMPT)
        session.feed(expected)
        draft, cuts = [], []
        for _ in range(16):
            move = rng.choice(["judge", "judge", "judge", "keep", "feed", "append", "rewind"])
            if move == "judge":
                draft = draft + [rng.randrange(5, tiny.VOCAB) for _ in range(rng.randint(1, 4))]
                new = sorted({rng.randint(max(cuts, default=0) + 1, len(draft)), len(draft)})
                cuts = cuts + new
                rows = session.judge(draft, cuts, SUFFIX, probes=new, path=path)
                plain = torch.stack([forward(model, [*expected, *draft[:cut], *SUFFIX])[-1] for cut in new])
                close(rows.probe_logits, plain)
                continue
            if move == "keep" and cuts:
                cut = rng.choice([0, *cuts])
                session.keep_draft(cut)
                expected = expected + draft[:cut]
            elif move == "rewind":
                expected = expected[: rng.randint(1, len(expected))]
                session.rewind(len(expected))
            else:
                expected = [*expected, rng.randrange(5, tiny.VOCAB)]
                session.append(expected[-1])
                if move != "append":
                    session.feed([])
            draft, cuts = [], []
            assert session.tokens == expected
        close(session.feed([7]), forward(model, [*expected, 7])[-1])


WORDS = [
    "a",
    "b1",
    "x = (",
    ")",
    "'",
    '"',
    '"""',
    "#",
    "\n",
    "\n\n",
    "\n",
    " ",
    ". ",
    "! ",
    "3.5",
    "。",
    "」",
    "1.",
    "\r\n",
    ":",
    "\\",
    "```",
    "@",
]


@pytest.mark.parametrize(
    "segmenter",
    [
        EveryTokens(delta=4),
        EveryTokens(delta=3, min_tokens=5),
        Lines(),
        Lines(min_tokens=4, max_tokens=6),
        Paragraphs(max_tokens=5),
        Sentences(),
        Sentences(min_tokens=3),
        CodeStatements(),
        CodeStatements(max_tokens=4, max_cuts=2),
    ],
    ids=str,
)
def test_sure_cuts_are_cuts_of_the_finished_draft(segmenter):
    """Whatever comes after: every cut of a beginning is a cut of the whole, none is missed but the last ones."""
    rng, found = random.Random(str(segmenter)), 0
    for _ in range(60):
        pieces = [rng.choice([*WORDS, *string.ascii_letters[:4]]) for _ in range(rng.randint(1, 30))]
        cuts = segmenter.cuts(spelt(pieces), thinned=False)
        seen = []
        for n in range(1, len(pieces) + 1):
            sure = segmenter.sure_cuts(spelt(pieces[:n]))
            assert sure[: len(seen)] == seen, "a sure cut was taken back"
            assert all(cut < n for cut in sure)
            seen = sure
        assert seen == cuts[: len(seen)]
        assert len(seen) < len(cuts)
        found += len(seen)
    assert found > 40


def started(model, lead):
    session = Session(model, (0, 2, 4) if model.has_attention else ())
    session.feed(PROMPT[: len(PROMPT) - (lead == "pending")])
    if lead == "pending":
        session.append(PROMPT[-1])
    return session


def forward(model, ids):
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def spelt(pieces):
    ends = tuple(itertools.accumulate(len(piece) for piece in pieces))
    return Draft(tuple(range(len(pieces))), "".join(pieces), ends, ended=False)


def close(a, b):
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-4)
