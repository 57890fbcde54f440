"""Masks equal the drawings in their docstrings, and the rules they state, cell by cell."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parsedec import masks

quick = settings(deadline=None, max_examples=60)
FULL = {"full_attention": None}


def drawing(builder):
    """(arguments, rows of x and .) as drawn in the docstring."""
    lines = builder.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\s+context=", line))
    arguments = eval(f"dict({lines[start].strip()})")
    cells = [re.findall(r"(?<=\s)[x.](?=\s|$)", line) for line in lines[start + 1 :]]
    return arguments, ["".join(row) for row in cells if row]


def drawn(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


@st.composite
def judge_passes(draw):
    draft = draw(st.integers(1, 9))
    cuts = sorted(draw(st.sets(st.integers(1, draft), min_size=1, max_size=4)))
    return dict(context=draw(st.integers(0, 5)), draft=draft, cuts=cuts, suffix=draw(st.integers(1, 4)))


@st.composite
def trees(draw):
    size = draw(st.integers(1, 12))
    return [-1, *(draw(st.integers(0, i - 1)) for i in range(1, size))]


@pytest.mark.parametrize("builder", [masks.probe_mask, masks.tree_mask], ids=lambda f: f.__name__)
def test_mask_equals_its_drawing(builder):
    arguments, rows = drawing(builder)
    mask = builder(**arguments)
    assert drawn(mask) == rows
    assert mask.dtype is torch.bool
    assert len(rows) > 3  # the drawing was found


@quick
@given(judge_passes())
def test_probe_sees_context_its_prefix_and_itself_causally(arguments):
    context, draft, cuts, suffix = arguments.values()
    mask = masks.probe_mask(**arguments).tolist()
    assert len(mask) == draft + len(cuts) * suffix
    for row, cells in enumerate(mask):
        assert len(cells) == context + len(mask)
        probe, within = divmod(row - draft, suffix)
        for column, visible in enumerate(cells):
            at = column - context  # of a row of this pass, or negative in the context
            if column < context:
                expected = True
            elif row < draft:
                expected = at <= row
            elif at < draft:
                expected = at < cuts[probe]
            else:
                expected = draft + probe * suffix <= at <= draft + probe * suffix + within
            assert visible == expected, (row, column)


def test_probe_restarts_right_after_its_cut():
    positions = masks.probe_positions(context=2, draft=3, cuts=[1, 3], suffix=2)
    assert positions.tolist() == [2, 3, 4, 3, 4, 5, 6]


@quick
@given(judge_passes())
def test_position_is_the_number_of_tokens_seen_before(arguments):
    """What makes a packed probe equal a separate call: its position counts exactly what it sees."""
    seen = masks.probe_mask(**arguments).sum(1)
    assert masks.probe_positions(**arguments).tolist() == (seen - 1).tolist()


@quick
@given(st.integers(0, 5), trees())
def test_tree_node_sees_context_ancestors_and_itself(context, parents):
    mask = masks.tree_mask(context, parents).tolist()
    for node, cells in enumerate(mask):
        ancestors = {node}
        while parents[min(ancestors)] >= 0:
            ancestors.add(parents[min(ancestors)])
        assert cells == [True] * context + [i in ancestors for i in range(len(parents))]


# --- the form a model takes ---


def as_model_takes(allowed, rows_at, columns_at, windows, dtype=torch.float32):
    return masks.for_model(allowed, rows_at, columns_at, windows=windows, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mask_for_a_model_is_additive(dtype):
    allowed = masks.tree_mask(2, [-1, 0, 0])
    mask = as_model_takes(allowed, torch.tensor([2, 3, 3]), torch.tensor([0, 1, 2, 3, 3]), FULL, dtype)
    assert mask.shape == (1, 1, 3, 5)
    assert mask.dtype is dtype
    assert torch.equal(mask[0, 0] == 0, allowed)
    assert set(mask[0, 0][~allowed].tolist()) == {torch.finfo(dtype).min}


def test_sliding_window_is_a_distance_between_positions():
    """context 4, draft 4, probes after 1 and 4 tokens, window 3: the second probe sees 1 draft token less than the
    first sees context, although it stands further from either in the pass."""
    arguments = dict(context=4, draft=4, cuts=[1, 4], suffix=2)
    rows_at = masks.probe_positions(**arguments)
    columns_at = torch.cat([torch.arange(4), rows_at])
    mask = as_model_takes(masks.probe_mask(**arguments), rows_at, columns_at, {"sliding_attention": 3})
    #        context  draft  probe0 probe1
    expected = [
        "..xx x... .. ..",
        "...x xx.. .. ..",
        ".... xxx. .. ..",
        ".... .xxx .. ..",
        "...x x... x. ..",
        ".... x... xx ..",
        ".... ..xx .. x.",
        ".... ...x .. xx",
    ]
    assert drawn(mask[0, 0] == 0) == [row.replace(" ", "") for row in expected]


def test_every_row_sees_at_most_a_window_of_positions():
    arguments = dict(context=7, draft=9, cuts=[2, 5, 9], suffix=4)
    rows_at = masks.probe_positions(**arguments)
    columns_at = torch.cat([torch.arange(7), rows_at])
    for window in (1, 2, 5, 100):
        mask = as_model_takes(masks.probe_mask(**arguments), rows_at, columns_at, {"sliding_attention": window})
        for row, cells in enumerate(mask[0, 0] == 0):
            at = int(rows_at[row])
            assert columns_at[cells].sort().values.tolist() == list(range(max(0, at - window + 1), at + 1))


def test_one_mask_per_kind_where_a_model_mixes_kinds():
    allowed = masks.probe_mask(3, 2, [2], 1)
    rows_at = masks.probe_positions(3, 2, [2], 1)
    columns_at = torch.cat([torch.arange(3), rows_at])
    windows = {"sliding_attention": 2, "full_attention": None}
    both = as_model_takes(allowed, rows_at, columns_at, windows)
    assert set(both) == set(windows)
    for kind, window in windows.items():
        assert torch.equal(both[kind], as_model_takes(allowed, rows_at, columns_at, {kind: window}))
    assert not torch.equal(both["sliding_attention"], both["full_attention"])
