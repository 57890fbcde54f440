"""Parts of one's own in the slots of a stack: little has to be written for them, and what is wrong with one is said."""

from functools import partial

import pytest
import torch

import tiny
from parsedec import Parse, PrefixVerification
from parsedec.acceptance import Siblings, Traversal, accept_greedy
from parsedec.boundary import FirstFailure, LongestValid
from parsedec.errors import ConfigError, JudgeError
from parsedec.inner import NoSpeculation
from parsedec.judge import (
    CombinedJudge,
    ConfidenceJudge,
    Judge,
    JudgeNeeds,
    LabelJudge,
    LogprobJudge,
    PassJudge,
    Scores,
)
from parsedec.loop import Rounds
from parsedec.peers import Cascade, LookaheadReasoning, SpecReason
from parsedec.segmenters import EveryTokens, Segmenter
from parsedec.streamed import StreamedVerification
from parsedec.types import JudgePath, Needs, Sampling, Tree
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.early_exit import SelfEarlyExit
from parsedec_adapters.hf_assisted import HfAssisted
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.parallelspec import ParallelSpec
from parsedec_adapters.pard import Pard
from parsedec_adapters.scripted import Scripted

PROMPT = [5, 6, 7]
GRID = EveryTokens(delta=4)


def judged_by(judge, outer=PrefixVerification, new=24, **parts):
    """A request under a judge; a tiny pair never agrees, so all scores come from it."""
    stack = Parse(tiny.model(), tiny.model(seed=7, layers=1), outer=outer(judge=judge, segmenter=GRID, **parts))
    return stack.generate(PROMPT, max_new_tokens=new)


def says(answer):
    """A judge that is one method."""

    class Own(PassJudge):
        def read(self, reading):
            return answer(reading)

    return Own()


# Judges


class Longest(PassJudge):
    """Reads text, and has a constructor of its own."""

    def __init__(self, most):
        self.most = most
        self.read_texts = []

    def read(self, reading):
        self.read_texts += reading.texts
        return [float(len(text) <= self.most) for text in reading.texts]


@pytest.mark.parametrize("outer", [PrefixVerification, StreamedVerification])
def test_a_judge_of_ones_own_is_a_read_of_the_texts(outer):
    judge = Longest(30)
    result = judged_by(judge, outer, boundary=FirstFailure())
    segments = result.rounds[0].segments
    texts = ["".join(s.text for s in segments[: i + 1]) for i in range(len(segments))]
    scores = [s.score for s in segments if s.score is not None]
    assert judge.read_texts == texts[: len(scores)]  # the list is that of its bound copy, too
    assert scores == [float(len(text) <= 30) for text in judge.read_texts]
    assert 0.0 in scores
    assert result.text.startswith(texts[scores.index(0.0) - 1])
    assert result.judge_path is JudgePath.CAUSAL


@pytest.mark.parametrize("outer", [PrefixVerification, StreamedVerification])
def test_a_judge_of_ones_own_knows_the_question_and_the_answer_of_earlier_rounds(outer):
    """Whatever of the draft has been staged by then."""
    seen = []

    class Asked(PassJudge):
        def read(self, reading):
            seen.append((reading.context, reading.probes[0]))
            return [float(probe == reading.cuts[0]) for probe in reading.probes]

    result = judged_by(Asked(), outer, boundary=FirstFailure(full_threshold=1.0), loop=Rounds(rounds=3))
    starts = [context for context, first in seen if first == GRID.delta]
    assert len(starts) == sum(done.judge_passes > 0 for done in result.rounds) >= 2
    assert starts[0] == tiny.model().decode(PROMPT, special=True)
    so_far = [context.removeprefix(starts[0]) for context in starts]
    assert all(result.text.startswith(text) for text in so_far)
    assert sorted(set(so_far), key=len) == so_far, "each round has more of the answer before it"


def test_a_suffix_of_ones_own_is_read_behind_every_prefix():
    class Asks(PassJudge):
        def read(self, reading):
            return reading.rows.probe_logits[:, 9].sigmoid()

    suffix = tuple(tiny.model().encode("<|end|><|user|>?<|end|><|assistant|>"))
    result = judged_by(Asks(suffix=suffix))
    drafted = result.rounds[0]
    assert result.judge_path is JudgePath.PACKED
    assert drafted.judge_rows == drafted.judged_tokens + len(suffix) * len(drafted.segments)
    forked = Asks(suffix=suffix).bind(tiny.model("lfm2"))
    assert (forked.chosen, bool(forked.reason)) == (JudgePath.FORKED, True)


def test_bind_may_return_the_judge_itself():
    class Same(PassJudge):
        def bind(self, target):
            return self

        def read(self, reading):
            return torch.ones(len(reading.probes))

    assert judged_by(Same()).kept_share == 1.0


@pytest.mark.parametrize(
    "given",
    [
        lambda k: torch.full((k,), 0.95),
        lambda k: torch.full((k, 1), 0.95, dtype=torch.float16),
        lambda k: [0.95] * k,
        lambda k: (0.95,) * k,
        lambda k: [torch.tensor(0.95)] * k,
        lambda k: torch.full((k,), 0.95).numpy(),
        lambda k: torch.ones(k, dtype=torch.bool),
        lambda k: [True] * k,
        lambda k: torch.full((k,), 1.00003),
        lambda k: torch.full((k,), 0.95, requires_grad=True),
    ],
)
def test_scores_of_any_usual_form_are_taken(given):
    segments = judged_by(says(lambda reading: given(len(reading.probes)))).rounds[0].segments
    assert {s.score for s in segments} <= {float(x) for x in (0.95, torch.tensor(0.95), torch.tensor(0.95).half(), 1)}
    assert all(type(s.score) is float for s in segments)


def test_a_list_of_scores_is_not_rounded():
    boundary = FirstFailure(threshold=0.95)
    assert judged_by(says(lambda reading: [0.95] * len(reading.probes)), boundary=boundary).kept_share == 1.0


def test_the_score_of_a_single_prefix_may_be_a_scalar():
    one = EveryTokens(delta=99)
    pair = (tiny.model(), tiny.model(seed=7, layers=1))
    engine = Parse(*pair, outer=PrefixVerification(judge=says(lambda _: torch.tensor(0.95)), segmenter=one))
    assert len(engine.generate(PROMPT, max_new_tokens=8).rounds[0].segments) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda k: None, r"Own\.read gave None; expected a score for each of \d prefixes: a tensor \[\d\]"),
        (lambda k: "good", "gave 'good'; expected a score for each"),
        (lambda k: ["good"] * k, r"gave \['good',.*; expected a score for each"),
        (lambda k: 0.95, r"gave values of shape \[\] for \d prefixes; expected one for each"),
        (lambda k: torch.tensor(0.95), r"gave values of shape \[\] for"),
        (lambda k: [0.95] * (k - 1), r"gave values of shape \[\d\] for"),
        (lambda k: torch.ones(k, 2), r"gave values of shape \[\d, 2\] for"),
        (lambda k: torch.full((k,), 7.0), "gave the score 7; expected a number from 0, surely wrong, to 1.*sigmoid"),
        (lambda k: [-0.5] * k, r"gave the score -0\.5; expected a number from 0"),
        (lambda k: [float("inf")] * k, "gave the score inf; expected a number from 0"),
        (lambda k: [float("nan")] * k, r"are not all numbers \(nan\)"),
    ],
)
@pytest.mark.parametrize("combined", [False, True])
def test_what_is_no_score_is_refused(given, said, combined):
    judge = says(lambda reading: given(len(reading.probes)))
    if combined:
        judge = CombinedJudge(judges={"own": judge, "logprob": LogprobJudge()}, weights={"own": 1, "logprob": 1})
    with pytest.raises(JudgeError, match=said):
        judged_by(judge)


class Whole:
    """A judge with all members of the protocol and no base class."""

    suffix_rows, card = 0, None
    needs = LogprobJudge().needs

    def __init__(self, answer):
        self.answer = answer

    def bind(self, target):
        return self

    def score(self, session, draft, cuts, probes):
        session.judge(draft.tokens, cuts, [])
        return self.answer(len(probes))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda k: [0.95] * k, r"Whole\.score gave \[0\.95,.*; expected parsedec\.judge\.Scores\(values=…"),
        (lambda k: None, r"Whole\.score gave None; expected parsedec\.judge\.Scores.*derived from PassJudge"),
        (lambda k: Scores((7.0,) * k, (), 1, JudgePath.CAUSAL), r"Whole gave the score 7\.0; expected a number from 0"),
        (lambda k: Scores((float("nan"),) * k, (), 1, JudgePath.CAUSAL), "gave the score nan"),
        (lambda k: Scores((torch.tensor(0.5),) * k, (), 1, JudgePath.CAUSAL), r"gave the score tensor\(0\.5"),
    ],
)
def test_a_judge_without_base_class_returns_scores(answer, said):
    with pytest.raises(JudgeError, match=said):
        judged_by(Whole(answer))
    right = judged_by(Whole(lambda k: Scores((1,) * k, (), 1, JudgePath.CAUSAL)), boundary=LongestValid())
    assert right.kept_share == 1.0


# What does not belong in a slot


class Hollow(Judge):
    """Has the protocol as a base class, and of its members those that do nothing."""

    def score(self, session, draft, cuts, probes): ...


class Bound(NoSpeculation):
    def bind(self, target, draft):
        return None


def stack(**parts):
    return lambda: Parse(tiny.model(), tiny.model(seed=7, layers=1), **parts)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (stack(inner=3), r"inner=3 has no lossless, needs, bind, start, propose, commit, rewind; .*of your own"),
        (stack(inner="ngram"), "inner='ngram'; expected an object.*inner=ngram"),
        (stack(draft_inner="ngram"), r"draft_inner='ngram'; expected an object.*draft\.inner=ngram"),
        (stack(inner=Bound()), r"Bound\.bind\(…\)=None has no lossless.*expected a copy of it for the target"),
        (stack(acceptance=3), r"acceptance=3 has no lossless, accept; expected Siblings\(\), .*Acceptance"),
        (stack(outer=LabelJudge()), r"outer=LabelJudge\(.* has no prefill, needs_draft, run; expected PrefixVerif"),
        (
            stack(judge=PrefixVerification()),
            r"judge=PrefixVerification.* has no score, needs, suffix_rows, card; ",
        ),
        (stack(judge=Hollow()), "has no bind, needs, suffix_rows, card; .*an object of your own with all that"),
        (lambda: PrefixVerification(judge=None), r"judge=None has no bind.*expected LabelJudge\(\)"),
        (
            lambda: PrefixVerification(boundary=0.9),
            r"boundary=0\.9 is no BoundaryRule; .*FirstFailure\(",
        ),
        (lambda: PrefixVerification(loop=3), r"loop=3 has no rounds; expected Once\(\) or Rounds\(rounds=3\)"),
        (lambda: PrefixVerification(gate=3), r"gate=3 has no allows; expected Always\(\).*parsedec\.gate\.Gate"),
        (
            lambda: StreamedVerification(segmenter=lambda draft: [3]),
            r"segmenter=<function.* is no Segmenter; expected Lines\(\), .*from parsedec\.segmenters\.Segm",
        ),
        (lambda: SpecReason(judge=3), "judge=3 has no bind"),
        (lambda: LookaheadReasoning(equivalence=3), "equivalence=3 has no bind, compare, asks"),
        (lambda: ConfidenceJudge(judge=3), r"judge\.judge=3 has no bind"),
        (lambda: Cascade(gate=3), "gate=3 has no allows"),
    ],
)
def test_what_does_not_belong_in_a_slot_is_refused_when_it_is_put_there(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


@pytest.mark.parametrize("missing", ["bind", "score", "needs", "suffix_rows", "card"])
def test_a_judge_is_told_which_member_it_lacks(missing):
    members = {name: value for name, value in vars(Whole).items() if name not in (missing, "__dict__", "__weakref__")}
    lacking = type("Lacking", (), members)(None)
    with pytest.raises(ConfigError, match=rf"judge=<.*> has no {missing}; expected LabelJudge\(\), or one derived"):
        stack(judge=lacking)()


def test_a_part_may_hand_on_what_it_has_not():
    class Watched:
        """Members by __getattr__ and a property that is not known yet."""

        def __init__(self, judge):
            self.judge = judge

        def bind(self, target):
            return Watched(self.judge.bind(target))

        @property
        def needs(self):
            if self.judge.chosen is None:
                raise AttributeError("known once it is bound")
            return self.judge.needs

        def __getattr__(self, name):
            return getattr(self.judge, name)

    assert judged_by(Watched(says(lambda reading: [1.0] * len(reading.probes)))).kept_share == 1.0


# Inner speculators


class Repeats:
    """Guesses that the last token is repeated."""

    lossless = True
    needs = Needs(hidden_layers=[2])

    def bind(self, target, draft):
        return self

    def start(self, tokens, seen, sampler):
        assert seen.taps.shape[:2] == (len(tokens) - 1, 1)
        return tuple(tokens)

    def propose(self, state, budget):
        return Tree.chain([state[-1]] * (1 + min(2, budget)))

    def commit(self, state, outcome):
        return state + outcome.tokens

    def rewind(self, state, length):
        return state[:length]


MEMBERS = ("lossless", "needs", "bind", "start", "propose", "commit", "rewind")


@pytest.mark.parametrize("missing", MEMBERS)
@pytest.mark.parametrize("slot", ["inner", "draft_inner"])
def test_a_speculator_is_told_which_member_it_lacks(slot, missing):
    members = {name: vars(Repeats)[name] for name in MEMBERS if name != missing}
    with pytest.raises(ConfigError, match=rf"{slot}=<.* has no {missing}; expected one of parsedec_adapters.*your own"):
        stack(**{slot: type("Lacking", (), members)()})()


def proposes(tree_of, **more):
    return type("Own", (Repeats,), {"propose": lambda self, state, budget: tree_of(state), **more})()


def decoded(inner, acceptance=None, **settings):
    engine = Parse(tiny.model(), inner=inner, acceptance=acceptance)
    return engine.generate(PROMPT, max_new_tokens=11, **settings)


def sampled():
    return {"sampling": Sampling(temperature=1.0), "generator": torch.Generator().manual_seed(0)}


def test_hidden_layers_may_be_a_list():
    assert JudgeNeeds([1, 2]).hidden_layers == (1, 2)
    assert decoded(Repeats()).tokens == decoded(None).tokens


def branching(state):
    """Right at every depth on a side branch: five levels, whatever the budget."""
    right = plain()[len(state) - len(PROMPT) :][:5]
    return Tree((state[-1], 9, *right), (-1, 0, 0, *range(2, 1 + len(right))))


def plain():
    return tiny.greedy(tiny.model(), PROMPT, 24)[0]


@pytest.mark.parametrize("acceptance", [Siblings(), Traversal()])
def test_a_tree_deeper_than_its_budget_is_cut_off(acceptance):
    """The end of an answer is where a budget is small; the answer is not lost there."""
    result = decoded(proposes(branching), acceptance)
    assert list(result.tokens) == plain()[:11]
    assert result.counters.target_calls < 5
    budgets = []

    class Counts(Repeats):
        def propose(self, state, budget):
            budgets.append(budget)
            return branching(state)

    decoded(Counts(), acceptance)
    assert min(budgets) < 5, "no tree was too deep"


def test_a_cut_tree_keeps_its_rows():
    tree = Tree((7, 1, 2, 3, 4), (-1, 0, 1, 0, 3), torch.arange(5.0)[:, None])
    assert [tree.first_levels(depth).tokens for depth in range(3)] == [(7,), (7, 1, 3), (7, 1, 2, 3, 4)]
    assert tree.first_levels(1).parents == (-1, 0, 0)
    assert tree.first_levels(1).logq.flatten().tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (lambda state: [5], r"Own proposed \[5\]; expected a Tree, e\.g\. Tree\.chain\(\[\d+, …\]\)"),
        (lambda state: None, "Own proposed None; expected a Tree"),
        (lambda state: Tree.chain([0, 6]), "a tree with root 0; expected the last committed token, .* in front"),
        (
            lambda state: Tree.chain([state[-1], 6], torch.zeros(2, 50)),
            r"a tree with logq \[2, 50\]; expected \[2, 64\]: .*every token of tiny llama",
        ),
        (lambda state: Tree.chain([state[-1], 6], torch.zeros(2)), r"logq \[2\]; expected \[2, 64\]"),
    ],
)
def test_a_proposal_that_cannot_be_verified_is_refused_by_name(tree, said):
    with pytest.raises(ValueError, match=said):
        decoded(proposes(tree), **sampled())


# Acceptance rules


class Rule:
    lossless = False

    def __init__(self, answer):
        self.answer = answer

    def accept(self, tree, logits, sampler):
        return self.answer(tree, logits) if tree.size > 1 else accept_greedy(tree, logits)


def test_a_rule_may_answer_in_tensors():
    def answer(tree, logits):
        path, bonus = accept_greedy(tree, logits)
        return torch.tensor(path), torch.tensor(bonus)

    result = decoded(proposes(branching), Rule(answer))
    assert list(result.tokens) == plain()[:11]
    assert all(type(token) is int for token in result.tokens)
    without = type("Always", (Rule,), {"accept": lambda self, tree, logits, sampler: answer(tree, logits)})
    assert all(type(token) is int for token in decoded(None, without(None), **sampled()).tokens)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            lambda tree, _: ([0, tree.size - 1], 5),
            r"Rule accepted the nodes \[0, \d\] of a tree with parents .*path",
        ),
        (lambda tree, _: ([0, 1, 2], 5), r"accepted the nodes \[0, 1, 2\]"),
        (lambda tree, _: ([], 5), r"accepted the nodes \[\]"),
        (lambda tree, _: ([1], 5), r"accepted the nodes \[1\]"),
        (lambda tree, _: ([0, tree.size], 5), r"accepted the nodes \[0, \d\]"),
        (lambda tree, _: ([0, -1], 5), r"accepted the nodes \[0, -1\]"),
        (lambda tree, _: ([0], 64), "Rule gave the token 64; expected an id from 0 to 63"),
        (lambda tree, _: ([0], -1), "Rule gave the token -1"),
        (lambda tree, _: [0], r"Rule gave \[0\]; expected \(path, token\)"),
        (lambda tree, _: None, r"Rule gave None; expected \(path, token\)"),
        (lambda tree, logits: ([0], logits), r"Rule gave \(\[0\], tensor.*; expected \(path, token\)"),
    ],
)
def test_what_is_no_path_of_the_tree_is_refused(answer, said):
    with pytest.raises(ValueError, match=said):
        decoded(proposes(branching), Rule(answer))


def test_a_rule_says_whether_it_is_lossless():
    class Silent:
        def accept(self, tree, logits, sampler):
            return accept_greedy(tree, logits)

    with pytest.raises(ConfigError, match=r"acceptance=<.*Silent.* has no lossless; expected Siblings\(\)"):
        stack(acceptance=Silent())()


# Segmenters


class EveryFew(Segmenter):
    """Has a constructor of its own, which does not call the other."""

    def __init__(self, n):
        self.n = n

    def ends(self, draft):
        return range(self.n, len(draft.tokens) + 1, self.n)


@pytest.mark.parametrize("outer", [PrefixVerification, StreamedVerification])
def test_a_segmenter_of_ones_own_is_its_ends(outer):
    judge = says(lambda reading: [1.0] * len(reading.probes))
    results = []
    for segmenter in (EveryFew(3), EveryTokens(delta=3)):
        engine = Parse(tiny.model(), tiny.model(seed=7, layers=1), outer=outer(judge=judge, segmenter=segmenter))
        results.append(engine.generate(PROMPT, max_new_tokens=20))
    own, same = ([s.tokens for s in result.rounds[0].segments] for result in results)
    assert own == same
    assert own[:6] == [3] * 6


# Numbers


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (DraftModel, {"length": (2.5, "4", True, 0), "confidence": ("x", 0, 1.5, True)}),
        (Ngram, {"length": (2.5, "4", 0), "longest": (4.0,), "shortest": (0,), "refused": (1,)}),
        (SelfEarlyExit, {"length": (2.5, "4"), "layers": (2.5, True, 0), "confidence": (2,)}),
        (HfAssisted, {"length": (2.5, "4", 0), "confidence": ("x", -1)}),
        (Pard, {"length": (2.5, "4", 0), "mask_token": ("5", -1)}),
        (partial(Scripted, rate=0.5), {"depth": (2.5, 0), "rate": ("x", 2), "seed": ("x",)}),
        (partial(ParallelSpec, head="zoo:parallelspec"), {"tokens": (2.5, 0), "top_k": ("x",), "depth": (2.5, 0)}),
        (partial(Eagle3, head="zoo:eagle3"), {"tokens": (2.5, 1), "top_k": ("x", 0), "depth": (2.5, -1)}),
        (partial(Medusa, heads="zoo:medusa", tree="chain"), {"nodes": (2.5, "4", 0)}),
    ],
)
def test_the_settings_of_a_speculator_are_numbers(make, settings):
    make()
    for name, wrong in settings.items():
        for value in wrong:
            with pytest.raises(ConfigError, match=rf"inner\.{name}={value!r}.*; expected "):
                make(**{name: value})


@pytest.mark.parametrize("top", [-1, 1.5, "x", True])
def test_how_many_tokens_are_shown_is_a_number_when_it_is_asked_for(top):
    engine = Parse(tiny.model())
    with pytest.raises(ConfigError, match=rf"top={top!r}; expected a whole number, at least 0"):
        engine.stream(PROMPT, top=top)
    assert [s.top for d in engine.stream(PROMPT, max_new_tokens=2, top=0) for s in d.shown] == [(), ()]
