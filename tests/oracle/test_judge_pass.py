"""The judge's pass against its oracle: separate forwards of [prompt, draft[:cut], suffix], one per probe.

Also the leak test (what a probe must not see cannot change its logits by a bit), the row count, what the pass gives
for free, and the traps of facts on masks: each wrong form must be *seen* to be wrong here.
"""

import dataclasses

import pytest
import torch

import tiny
from parsedec import masks
from parsedec.errors import IncompatibleStack, JudgeError
from parsedec.judge import LabelJudge
from parsedec.sessions.selftest import probe_error
from parsedec.sessions.session import Session
from parsedec.types import JudgePath

GENERATOR = torch.Generator().manual_seed(11)
PROMPT = torch.randint(5, tiny.VOCAB, (20,), generator=GENERATOR).tolist()
DRAFT = torch.randint(5, tiny.VOCAB, (17,), generator=GENERATOR).tolist()
CUTS = [3, 8, 12, 17]
SUFFIX = [1, 2, 7, 1, 3]
ATOL = 1e-4


def forward(model, ids):
    """Logits [len(ids), V] of one plain forward without a cache."""
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def separate(model, prompt=PROMPT, draft=DRAFT, cuts=CUTS, suffix=SUFFIX):
    return torch.stack([forward(model, [*prompt, *draft[:cut], *suffix])[-1] for cut in cuts])


def judged(model, path, prompt=PROMPT, draft=DRAFT, suffix=SUFFIX):
    session = Session(model)
    session.feed(prompt)
    return session, session.judge(draft, CUTS, suffix, path=path)


def max_error(a, b):
    return float((a.float() - b.float()).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.PACKED)
def test_packed_scores_equal_separate_forwards(family, attention):
    model = tiny.model(family, attention=attention)
    session, rows = judged(model, JudgePath.PACKED)
    reference = separate(model)
    assert float(reference.std()) > 0.3, "flat logits would make every mask look right"
    assert max_error(rows.probe_logits, reference) <= ATOL
    assert rows.rows == len(DRAFT) + len(CUTS) * len(SUFFIX)  # exactly N + K*S
    assert session.rows == len(PROMPT) + rows.rows


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_forked_batch_gives_the_same_scores(family):
    model = tiny.model(family)
    _, rows = judged(model, JudgePath.FORKED)
    assert max_error(rows.probe_logits, separate(model)) <= ATOL
    assert rows.rows == len(DRAFT) + len(CUTS) * len(SUFFIX)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_draft_logprobs_and_cut_logits_come_with_the_pass(family):
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    plain = forward(model, PROMPT + DRAFT)
    expected = plain[len(PROMPT) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(DRAFT)[:, None])[:, 0]
    for cut in [0, *CUTS]:
        session, rows = judged(model, path)
        assert max_error(rows.draft_logprobs, expected) <= ATOL
        calls = session.calls
        session.keep_draft(cut)
        assert session.tokens == PROMPT + DRAFT[:cut]
        assert max_error(session.next_logits, plain[len(PROMPT) + cut - 1]) <= ATOL
        assert session.calls == calls, "keeping must not cost a forward"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_passes_reuse_the_draft_rows(family):
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    session = Session(model)
    session.feed(PROMPT)
    whole = session.judge(DRAFT, CUTS, SUFFIX, probes=CUTS[-1:], path=path)
    prefixes = session.judge(DRAFT, CUTS, SUFFIX, probes=CUTS[:-1], path=path)
    assert max_error(torch.cat([prefixes.probe_logits, whole.probe_logits]), separate(model)) <= ATOL
    assert whole.rows == len(DRAFT) + len(SUFFIX)
    assert prefixes.rows == (len(CUTS) - 1) * len(SUFFIX)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pending_token_is_a_prefix_every_probe_sees(family):
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    session = Session(model)
    session.feed(PROMPT[:-1])
    session.append(PROMPT[-1])
    rows = session.judge(DRAFT, CUTS, SUFFIX, path=path)
    assert max_error(rows.probe_logits, separate(model)) <= ATOL
    session.keep_draft(CUTS[1])
    assert session.tokens == PROMPT + DRAFT[: CUTS[1]]
    assert max_error(session.next_logits, forward(model, session.tokens)[-1]) <= ATOL


@pytest.mark.parametrize("family", tiny.PACKED)
def test_leak_is_bit_exact(family):
    """Change every draft token behind a cut: the probes up to it keep their logits to the last bit.

    Experts are computed row by row here: grouped by expert, a matrix product rounds differently with the number of
    rows that happen to share an expert, which is no leak.
    """
    model = tiny.model(family, experts="batched_mm")
    _, before = judged(model, JudgePath.PACKED)
    for k, cut in enumerate(CUTS[:-1]):
        other = DRAFT[:cut] + [5 + (token - 5 + 1) % (tiny.VOCAB - 5) for token in DRAFT[cut:]]
        _, after = judged(model, JudgePath.PACKED, draft=other)
        assert torch.equal(before.probe_logits[: k + 1], after.probe_logits[: k + 1])
        assert not torch.equal(before.probe_logits[k + 1 :], after.probe_logits[k + 1 :])


@pytest.mark.parametrize("family", tiny.PACKED)
def test_bf16_error_is_at_most_twice_that_of_a_plain_forward(family):
    exact, low = tiny.model(family), tiny.model(family, dtype=torch.bfloat16)
    reference = separate(exact)
    ours = max_error(judged(low, JudgePath.PACKED)[1].probe_logits, reference)
    baseline = max_error(separate(low), reference)
    assert ours <= 2 * baseline, f"packed bf16 error {ours:.3f} exceeds twice the plain one's {baseline:.3f}"


def test_window_reaches_across_packed_rows():
    """Sliding layers measure distance in positions: in a pass this long, row distance would cut the prefix off."""
    model = tiny.model("gemma3")
    draft, suffix = DRAFT, SUFFIX * 3
    cuts = list(range(1, len(draft) + 1))
    session = Session(model)
    session.feed(PROMPT)
    rows = session.judge(draft, cuts, suffix)
    assert max_error(rows.probe_logits, separate(model, cuts=cuts, suffix=suffix)) <= ATOL


class Traps:
    """Forms of the mask that transformers accepts and computes something else with."""

    @staticmethod
    def boolean_mask_in_eager(allowed, rows_at, columns_at, *, windows, dtype, device):
        return allowed[None, None]

    @staticmethod
    def one_mask_for_all_layer_kinds(allowed, rows_at, columns_at, *, windows, dtype, device):
        additive = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(dtype).min)
        return additive[None, None]

    @staticmethod
    def no_mask(allowed, rows_at, columns_at, *, windows, dtype, device):
        return None


@pytest.mark.parametrize(
    ("trap", "family", "attention"),
    [("boolean_mask_in_eager", "llama", "eager"), ("one_mask_for_all_layer_kinds", "gemma3", "sdpa"),
     ("no_mask", "llama", "sdpa"), ("no_mask", "qwen3", "sdpa")],
)  # fmt: skip
def test_known_traps_are_wrong_and_the_self_test_sees_them(monkeypatch, trap, family, attention):
    model = dataclasses.replace(tiny.model(family, attention=attention))  # a copy: results are remembered by model
    assert probe_error(model, SUFFIX, JudgePath.PACKED) is None
    model = dataclasses.replace(model)
    monkeypatch.setattr(masks, "for_model", getattr(Traps, trap))
    assert max_error(judged(model, JudgePath.PACKED)[1].probe_logits, separate(model)) > 0.1
    assert "packed logits differ from plain forwards" in probe_error(model, SUFFIX, JudgePath.PACKED)
    bound = LabelJudge(question="?").bind(model)
    assert bound.chosen is JudgePath.FORKED
    assert "plain forwards" in bound.reason


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_path_is_chosen_by_what_the_model_holds(family):
    bound = LabelJudge(question="?").bind(tiny.model(family))
    assert bound.chosen is (JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED)
    assert (bound.reason is None) == (family in tiny.PACKED)


@pytest.mark.parametrize("family", tiny.FORKED)
def test_packing_is_refused_where_it_would_be_silently_wrong(family):
    model = tiny.model(family)
    with pytest.raises(IncompatibleStack, match=r"recurrent or convolutional.*auto"):
        LabelJudge(question="?", path="packed").bind(model)
    with pytest.raises(IncompatibleStack, match="recurrent or convolutional"):
        judged(model, JudgePath.PACKED)


@pytest.mark.parametrize(
    ("cuts", "probes"), [([8, 3], None), ([3, 3], None), ([0, 3], None), ([3, 18], None), ([], None), ([3, 8], [5])]
)
def test_unusable_cuts_are_refused(tiny_target, cuts, probes):
    session = Session(tiny_target)
    session.feed(PROMPT)
    with pytest.raises(JudgeError, match=r"cuts|probes"):
        session.judge(DRAFT, cuts, SUFFIX, probes=probes)
    assert session.tokens == PROMPT  # nothing lost
