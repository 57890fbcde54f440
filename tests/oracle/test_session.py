"""A session, whatever was done to it, equals a plain forward over its tokens: logits, taps, and its copies."""

import random

import pytest
import torch

import tiny
from parsedec.errors import IncompatibleStack, PromptError
from parsedec.sessions.session import Session
from parsedec.static.session import StaticSession
from parsedec.types import JudgePath, Tree

ATOL = 1e-4
SUFFIX = [1, 2, 7, 1, 3]
TAPS = (0, 2, 4)


def tokens(n, seed=0):
    return torch.randint(5, tiny.VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model, ids, taps=()):
    """Logits [T, V] and taps [T, L, H] of one forward without a cache."""
    with torch.inference_mode():
        out = model.hf(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return out.logits[0], torch.stack([out.hidden_states[i][0] for i in taps], dim=1) if taps else None


def close(a, b):
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", tiny.PACKED)
def test_one_forward_over_a_tree_equals_one_forward_per_path(family):
    model, prompt = tiny.model(family), tokens(20)
    tree = Tree(tuple(tokens(10, seed=1)), (-1, 0, 0, 1, 1, 2, 3, 5, 5, 8))
    for path in (tree.path_to(node) for node in range(tree.size)):
        session = Session(model, TAPS)
        session.feed(prompt)
        session.append(tree.tokens[0])
        logits = session.tree(tree)
        ids = prompt + [tree.tokens[i] for i in path]
        expected, hidden = plain(model, ids, TAPS)
        close(logits[path[-1]], expected[-1])
        session.keep(path)
        assert session.tokens == ids
        close(session.next_logits, expected[-1])
        close(session.seen(0).taps, hidden)
        # and the cache holds that path alone
        close(session.feed([9]), plain(model, [*ids, 9])[0][-1])


@pytest.mark.parametrize("static", [False, True])
def test_taps_of_what_was_refused_are_not_kept(static):
    """A long answer holds the hidden states of its own tokens, not those of every guess and probe that was read."""
    model = tiny.model("llama")
    session = (StaticSession if static else Session)(model, TAPS)
    session.feed(tokens(20))
    session.append(7)
    for step in range(12):
        tree = Tree((session.tokens[-1], *tokens(6, seed=step)), (-1, 0, 0, 1, 1, 2, 3))
        session.tree(tree)
        session.keep(([0], [0, 1], [0, 2, 5])[step % 3])
        session.append(9)
    for kept in (0, 3, 8):
        session.judge(tokens(8), [3, 8], SUFFIX)
        session.keep_draft(kept)
        session.append(9)
    session.read_ahead()
    seen = session.seen(0).taps
    close(seen, plain(model, session.tokens[:-1], TAPS)[1])
    held = {rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes() for rows in session._tap_rows}
    assert sum(held.values()) == seen.nbytes


@pytest.mark.parametrize("family", tiny.FORKED)
def test_branches_are_refused_where_states_cannot_branch(family):
    session = Session(tiny.model(family))
    session.feed(tokens(6))
    session.append(7)
    with pytest.raises(IncompatibleStack, match="branching tree"):
        session.tree(Tree((7, 8, 9), (-1, 0, 0)))
    assert session.tokens == [*tokens(6), 7]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_random_walk_equals_a_plain_forward(family, seed):
    model = tiny.model(family)
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    rng = random.Random(f"{family}{seed}")
    session = Session(model, TAPS if model.has_attention else ())
    expected = tokens(6, seed)
    session.feed(expected)

    def some(n):
        return [rng.randrange(5, tiny.VOCAB) for _ in range(n)]

    for _ in range(14):
        move = rng.choice(["feed", "append", "tree", "judge", "rewind", "fork"])
        if move == "feed":
            new = some(rng.randint(1, 4))
            session.feed(new)
            expected = expected + new
        elif move == "append":
            expected = expected + some(1)
            session.append(expected[-1])
        elif move == "tree":
            if not session.pending:
                expected = expected + some(1)
                session.append(expected[-1])
            guesses = some(rng.randint(0, 5))
            branches = family in tiny.PACKED and rng.random() < 0.7
            parents = [rng.randrange(node + 1) if branches else node for node in range(len(guesses))]
            tree = Tree((expected[-1], *guesses), (-1, *parents))
            session.tree(tree)
            if rng.random() < 0.8:  # otherwise the pass is dropped by whatever comes next
                accepted = tree.path_to(rng.randrange(tree.size))
                session.keep(accepted)
                expected = expected + [tree.tokens[node] for node in accepted[1:]]
        elif move == "judge":
            draft, cuts = some(8), [2, 5, 8]
            session.judge(draft, cuts, SUFFIX, path=path)
            if rng.random() < 0.8:
                cut = rng.choice([0, *cuts])
                session.keep_draft(cut)
                expected = expected + draft[:cut]
        elif move == "rewind":
            expected = expected[: rng.randint(1, len(expected))]
            session.rewind(len(expected))
        else:
            other = session
            session = session.fork()
            other.feed(some(3))  # what the original does later must not reach the copy
        assert session.tokens == expected
    logits, hidden = plain(model, expected, session.taps)
    close(session.feed([]), logits[-1])
    if session.taps:
        for start in (0, len(expected) // 2, len(expected) - 1, len(expected)):
            close(session.seen(start).taps, hidden[start:])


def test_judging_needs_a_prompt(tiny_target):
    with pytest.raises(PromptError, match="feed the prompt first"):
        Session(tiny_target).judge(tokens(5), [5], SUFFIX)


def test_verbs_out_of_order_are_refused(tiny_target):
    session = Session(tiny_target)
    session.feed(tokens(5))
    with pytest.raises(ValueError, match="tree root is 9"):
        session.tree(Tree.chain([9]))
    with pytest.raises(ValueError, match="needs a staged tree"):
        session.keep([0])
    with pytest.raises(ValueError, match="needs a judged draft"):
        session.keep_draft(3)
    session.judge(tokens(6), [3, 6], SUFFIX)
    with pytest.raises(ValueError, match="one of the cuts"):
        session.keep_draft(4)
    with pytest.raises(ValueError, match="expected 0 to 5"):
        session.rewind(6)


def test_a_full_context_is_refused_before_anything_is_computed():
    model = tiny.model("llama", context_limit=10)
    session = Session(model)
    with pytest.raises(PromptError, match="exceed the context"):
        session.feed(tokens(11))
    assert session.calls == 0
