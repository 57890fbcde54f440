"""The small policies: what of a judged draft stands, whether to draft at all, how many rounds to make."""

import math
import random
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsedec.boundary import FirstFailure, LongestValid, Smoothed, log_odds
from parsedec.errors import ConfigError
from parsedec.gate import Adaptive, Always, GateHistory, Never
from parsedec.loop import Once, Rounds
from parsedec.models.language_model import JudgeCard

RULES = [FirstFailure, LongestValid, Smoothed]
probabilities = st.floats(0, 1)
quick = settings(deadline=None, max_examples=100)

# --- boundary rules ---


@pytest.mark.parametrize(
    ("scores", "first_failure", "longest_valid"),
    [
        ([], 0, 0),
        ([0.95], 1, 1),
        ([0.9, 0.9], 2, 2),  # the threshold itself passes
        ([0.89], 0, 0),
        ([0.95, 0.2, 0.95, 0.1], 1, 3),
        ([0.1, 0.99], 0, 2),
        ([0.99, 0.98, 0.1], 2, 2),
        ([math.nextafter(0.9, 0)] * 3, 0, 0),
    ],
)
def test_first_failure_and_longest_valid(scores, first_failure, longest_valid):
    assert FirstFailure(threshold=0.9).keep(scores) == first_failure
    assert LongestValid(threshold=0.9).keep(scores) == longest_valid


def test_smoothed_forgives_one_odd_score_but_no_run_of_them():
    rule = Smoothed(threshold=0.7, window=3)
    assert rule.keep([0.99, 0.99, 0.4, 0.99]) == 4
    assert FirstFailure(threshold=0.7).keep([0.99, 0.99, 0.4, 0.99]) == 2
    # log-odds of 0.99, 0.4, 0.3 and 0.2 are 4.6, -0.4, -0.8 and -1.4, of the threshold 0.85; means of three
    # are 2.9, 1.1 and -0.9
    assert rule.keep([0.99, 0.99, 0.4, 0.3, 0.2]) == 4


@quick
@given(st.lists(probabilities, max_size=9), probabilities)
def test_smoothed_over_one_prefix_is_first_failure(scores, threshold):
    """Away from 0 and 1, where log-odds are clipped, and from ties, where they round."""
    clear = [s for s in scores if 1e-3 < s < 1 - 1e-3 and abs(s - threshold) > 1e-6]
    if 1e-3 < threshold < 1 - 1e-3:
        assert Smoothed(threshold=threshold, window=1).keep(clear) == FirstFailure(threshold=threshold).keep(clear)


def test_smoothed_passes_scores_that_all_equal_the_threshold():
    kept = {
        (threshold, window): Smoothed(threshold=threshold, window=window).keep([threshold] * 12)
        for threshold in (0.1, 0.45, 0.7, 0.9)
        for window in (1, 3, 7, 10)
    }
    assert set(kept.values()) == {12}


@quick
@given(st.lists(probabilities, max_size=9), probabilities)
def test_rules_from_strict_to_lax(scores, threshold):
    first, longest = FirstFailure(threshold=threshold).keep(scores), LongestValid(threshold=threshold).keep(scores)
    assert 0 <= first <= longest <= len(scores)
    assert all(score >= threshold for score in scores[:first])
    assert all(score < threshold for score in scores[longest:])


@pytest.mark.parametrize("rule", RULES)
def test_certainty_is_kept_and_impossibility_is_not(rule):
    assert rule().keep([1.0, 1.0]) == 2
    assert rule().keep([0.0, 0.0]) == 0


@pytest.mark.parametrize(
    ("settings", "card", "thresholds"),
    [
        ({}, None, (0.9, 0.9)),
        ({}, (0.6, 0.7), (0.6, 0.7)),
        ({"threshold": 0.5}, None, (0.5, 0.9)),
        ({"threshold": 0.5}, (0.6, 0.7), (0.5, 0.7)),
        ({"full_threshold": 0.0}, (0.6, 0.7), (0.6, 0.0)),
    ],
)
def test_thresholds_left_open_come_from_the_judge_card(settings, card, thresholds):
    if card:
        card = JudgeCard(question="?", labels=("yes", "no"), threshold=card[0], full_threshold=card[1])
    rule = FirstFailure(**settings).bind(card)
    prefix, full = thresholds
    assert rule.keep([prefix, prefix - 0.01]) == 1
    assert rule.whole(full)
    assert not rule.whole(full - 0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_score_that_is_no_number_never_passes(rule):
    assert rule(threshold=0.5).keep([math.nan, math.nan]) == 0
    assert not rule(full_threshold=0.5).whole(math.nan)


def test_log_odds():
    assert log_odds(0.5) == 0
    assert log_odds(0.9) == pytest.approx(math.log(9))
    assert log_odds(0.0) == pytest.approx(-log_odds(1.0))
    assert math.isfinite(log_odds(0.0))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("rule", RULES)
def test_threshold_is_a_probability(rule, wrong):
    with pytest.raises(ConfigError, match="threshold"):
        rule(threshold=wrong)


def test_smoothed_needs_a_window():
    with pytest.raises(ConfigError, match="window=0"):
        Smoothed(window=0)


# --- the gate: a bench that fills in the history as an engine does ---

TOKEN_S = 0.02  # what the target needs for a token
ANSWER = 40  # tokens of an answer


class Bench:
    """Requests through a gate. `waste` is what drafting cost, net of what it saved, in target tokens."""

    def __init__(self, gate, seed=0):
        self.gate, self.random = gate, random.Random(seed)
        self.history = GateHistory()
        self.waste = self.largest = 0.0
        self.answered = 0
        self.drafted = []

    def request(self, cost, kept):
        """One request whose draft, if there is one, costs `cost` target tokens and leaves `kept`."""
        drafting = self.gate.allows(self.history)
        self.drafted.append(drafting)
        kept = kept if drafting else 0
        if drafting:
            per_token = self.gate.cost_per_token
            tokens = ANSWER if per_token is None else round(cost / per_token)
            cost = cost if per_token is None else per_token * tokens
            self.history.add_draft(cost * TOKEN_S, tokens, kept)
            self.waste += cost - kept
            self.largest = max(self.largest, cost)
        self.history.add_decoding(ANSWER - kept, TOKEN_S * (ANSWER - kept))
        self.history.add_answer(ANSWER)
        self.answered += ANSWER

    def refused(self, requests):
        for _ in range(requests):
            self.request(self.random.uniform(0, 2 * ANSWER) * self.random.choice((0.1, 1)), 0)

    def accepted(self, requests):
        for _ in range(requests):
            self.request(self.random.uniform(0.1, 0.4) * ANSWER, ANSWER)


MEASURED_AND_FIXED = pytest.mark.parametrize("cost_per_token", [None, 0.3], ids=["measured", "fixed"])


@MEASURED_AND_FIXED
@pytest.mark.parametrize("bound", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_waste_is_bounded_when_every_draft_is_refused(cost_per_token, bound, seed):
    bench = Bench(Adaptive(bound=bound, cost_per_token=cost_per_token), seed)
    for _ in range(500):
        bench.refused(1)
        assert bench.waste <= bound * bench.answered + max(bench.gate.reserve, bench.largest) + bench.largest
    assert sum(bench.drafted) > 1  # it went on looking
    assert not all(bench.drafted)


@MEASURED_AND_FIXED
@pytest.mark.parametrize("reserve", [0.0, 128.0])
def test_past_gain_can_be_lost_again_only_up_to_the_reserve(cost_per_token, reserve):
    bench = Bench(Adaptive(reserve=reserve, cost_per_token=cost_per_token), 3)
    bench.accepted(200)
    gained, answered = bench.waste, bench.answered
    assert gained < -20 * max(1.0, reserve)
    for _ in range(500):
        bench.refused(1)
        since = bench.gate.bound * (bench.answered - answered)
        assert bench.waste - gained <= since + max(reserve, bench.largest) + bench.largest


@MEASURED_AND_FIXED
def test_it_always_drafts_while_drafts_are_kept(cost_per_token):
    bench = Bench(Adaptive(cost_per_token=cost_per_token))
    bench.accepted(300)
    assert all(bench.drafted)


@MEASURED_AND_FIXED
def test_it_recovers_after_a_bad_stretch(cost_per_token):
    bench = Bench(Adaptive(cost_per_token=cost_per_token), 1)
    bench.accepted(50)
    bench.refused(300)
    assert sum(bench.drafted[-100:]) < 30
    bench.accepted(300)
    assert sum(bench.drafted[-200:]) > 190


def history_of(*events):
    """Drafts as (drafted, kept), answers as their number of tokens."""
    history = GateHistory()
    for event in events:
        if isinstance(event, tuple):
            history.add_draft(0.0, *event)
        else:
            history.add_answer(event)
    return history


def test_drafts_are_made_until_the_target_has_been_timed():
    """Costs are measured in target tokens, so without one there is nothing to measure by."""
    history = GateHistory()
    history.add_draft(100.0, 40, 0)
    assert Adaptive().allows(history)
    history.add_decoding(40, 40 * TOKEN_S)
    history.add_answer(40)
    assert not Adaptive().allows(history)


def test_a_draft_must_be_covered_by_the_account():
    # a refused draft of 20 tokens costs 10; it and the next need 20, which is 0.05 of 400 tokens
    gate = Adaptive(bound=0.05, cost_per_token=0.5)
    assert not gate.allows(history_of((20, 0), 399))
    assert gate.allows(history_of((20, 0), 400))


def test_account_is_credited_what_is_kept_and_never_holds_more_than_the_reserve():
    gate = Adaptive(bound=0.1, cost_per_token=0.5)
    history = history_of((100, 90), 50, (20, 0), (10, 4))
    assert gate.account(history, 1000) == (90 - 50) + 5 - 10 + (4 - 5)
    assert gate.account(history, 8) == 8 - 10 + (4 - 5)


def test_a_long_good_time_does_not_pay_for_a_long_bad_one():
    """What was answered before the drafts turned bad buys no more than the reserve."""
    bench = Bench(Adaptive(bound=0.05, reserve=64.0, cost_per_token=0.25))
    for _ in range(2000):
        bench.request(10, ANSWER)
    before = len(bench.drafted)
    for _ in range(100):
        bench.request(10, 0)
    assert sum(bench.drafted[before:]) <= 64 / 10 + 0.05 * 100 * ANSWER / 10 + 1


def test_history_is_bounded():
    history = history_of(*([(20, 0), 40] * 5000))
    assert len(history.events) == 4096
    assert len(history.drafts) == 2048


def test_threads_share_a_history():
    """Threads take turns as often as Python lets them, while each adds to what the others read."""
    history, gate, failed = history_of(*[(2, 2), 4] * 2000), Adaptive(cost_per_token=0.5), []

    def work():
        try:
            for _ in range(100):
                assert gate.allows(history)
                history.add_draft(0.0, 2, 2)
                history.add_answer(4)
                history.add_decoding(3, 0.25)
        except RuntimeError as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert (history.decoded_tokens, history.decode_s, len(history.events)) == (1200, 100.0, 4096)


def test_never_and_always():
    for history in (GateHistory(), history_of(*[(100, 0), 10] * 9)):
        assert Always().allows(history)
        assert not Never().allows(history)


@pytest.mark.parametrize(
    "wrong", [{"bound": 0.0}, {"bound": -1.0}, {"reserve": -1.0}, {"window": 0}, {"cost_per_token": -0.1}], ids=str
)
def test_gate_refuses_wrong_values(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        Adaptive(**wrong)


# --- loop policies ---


def test_rounds():
    assert Once().rounds == 1
    assert Rounds(rounds=3).rounds == 3
    with pytest.raises(ConfigError, match="rounds=0"):
        Rounds(rounds=0)
