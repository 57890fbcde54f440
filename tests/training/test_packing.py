"""A packed training row is a judge pass: same mask, same positions, same logits at the verdicts, and nothing leaks."""

import dataclasses
import random

import pytest
import torch

import tiny
from parsedec.errors import IncompatibleStack
from parsedec.sessions.session import Session
from parsedec.training.packing import IGNORED, RIGHT, WRONG, Answer, Packer, Row

ANSWERS = (
    Answer(tuple(range(10, 21)), (3, 7, 11), (True, True, False), 7, 9, True),
    Answer(tuple(range(30, 36)), (2, 6), (True, True), 7),
    Answer(tuple(range(40, 44)), (), (), 0),
)
ROW = Row((2, 12, 13, 3), ANSWERS)


def forward(model, batch):
    with torch.inference_mode():
        return model.hf(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask,
            use_cache=False).logits  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_verdict_rows_equal_a_judge_pass(family):
    model = tiny.model(family)
    packer = Packer.of(model)
    logits = forward(model, packer.pack([ROW], packer.length(ROW) + 5))[0]
    for answer, places in zip(ROW.answers, packer.verdict_positions(ROW), strict=True):
        if not answer.cuts:
            continue
        session = Session(model)
        session.feed(ROW.prompt)
        judged = session.judge(answer.tokens, answer.cuts, packer.suffix)
        torch.testing.assert_close(logits[places], judged.probe_logits, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_and_padding_do_not_touch_each_other(tiny_target):
    packer = Packer.of(tiny_target)
    other = Row((2, 50, 51, 52, 3), ANSWERS[1:])
    both = forward(tiny_target, packer.pack([ROW, other]))
    for place, row in enumerate((ROW, other)):
        alone = forward(tiny_target, packer.pack([row]))[0]
        torch.testing.assert_close(both[place, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_no_answer_sees_another(tiny_target):
    packer = Packer.of(tiny_target)
    changed = dataclasses.replace(ANSWERS[0], tokens=tuple(reversed(ANSWERS[0].tokens)))
    before = forward(tiny_target, packer.pack([ROW]))[0]
    after = forward(tiny_target, packer.pack([Row(ROW.prompt, (changed, *ANSWERS[1:]))]))[0]
    untouched = len(ROW.prompt) + packer.width(ANSWERS[0])
    assert torch.equal(before[untouched:], after[untouched:])
    assert not torch.equal(before[len(ROW.prompt) : untouched], after[len(ROW.prompt) : untouched])


def test_labels_are_the_next_tokens_and_the_verdicts(tiny_target):
    packer = Packer.of(tiny_target)
    row = Row(ROW.prompt, ANSWERS[:1])
    batch = packer.pack([row])
    labels, p = batch.labels[0].tolist(), len(row.prompt)
    assert labels[: p - 1] == [IGNORED] * (p - 1)
    assert labels[p - 1 : p + 6] == list(ANSWERS[0].tokens[:7])
    assert labels[p + 6 : p + 11] == [IGNORED] * 5  # from the first error on nothing is learnt as text
    right, wrong = packer.label_ids
    assert [labels[i] for i in packer.verdict_positions(row)[0]] == [right, right, wrong]
    assert batch.verdicts.sum() == 3
    slips = {p + i: WRONG if i == 9 else RIGHT for i in range(10)}
    assert batch.slips[0].tolist() == [slips.get(i, IGNORED) for i in range(len(labels))]
    whole = packer.pack([Row(ROW.prompt, ANSWERS[1:2])])
    assert whole.labels[0, p + 5] == packer.end_id  # a right answer is also taught to end


def test_what_does_not_fit_is_left_out():
    packer = Packer.of(tiny.model("llama"))
    assert packer.fit(ROW, packer.length(ROW)) == ROW
    shorter = packer.fit(ROW, packer.length(ROW) - 1)
    assert shorter.answers == ANSWERS[:2]
    assert packer.fit(ROW, len(ROW.prompt) + 3) is None
    with pytest.raises(ValueError, match="does not fit"):
        packer.pack([ROW], packer.length(ROW) - 1)


def test_answer_refuses_what_contradicts_itself():
    for cuts, right, taught in [((3, 2), (True, True), 0), ((1,), (), 0), ((9,), (True,), 0), ((), (), 5)]:
        with pytest.raises(ValueError, match="Answer"):
            Answer((7, 8, 9), cuts, right, taught)
    for sound, slips in [(-1, False), (4, False), (3, True)]:
        with pytest.raises(ValueError, match="sound"):
            Answer((7, 8, 9), (), (), 0, sound, slips)


def test_recurrent_models_are_refused():
    with pytest.raises(IncompatibleStack, match="packed"):
        Packer.of(tiny.model("mamba2"))


def test_random_rows_agree_with_separate_calls(tiny_target):
    """Every verdict against a plain forward of prompt, prefix and suffix: no mask of ours on that side."""
    packer, rng = Packer.of(tiny_target), random.Random(0)
    answers = []
    for _ in range(3):
        n = rng.randint(1, 12)
        cuts = sorted(rng.sample(range(1, n + 1), min(n, 3)))
        answers.append(Answer(tuple(rng.randrange(5, 64) for _ in range(n)), tuple(cuts), (True,) * len(cuts), 0))
    row = Row((2, 9, 3), tuple(answers))
    logits = forward(tiny_target, packer.pack([row]))[0]
    for answer, places in zip(answers, packer.verdict_positions(row), strict=True):
        for cut, place in zip(answer.cuts, places, strict=True):
            ids = torch.tensor([[*row.prompt, *answer.tokens[:cut], *packer.suffix]])
            with torch.inference_mode():
                plain = tiny_target.hf(input_ids=ids).logits[0, -1]
            torch.testing.assert_close(logits[place], plain, rtol=1e-4, atol=1e-4)
