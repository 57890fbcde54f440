"""Turns at a model: many plain forwards together, one that changes it by itself, and nobody waits for ever."""

import gc
import threading
import time
import weakref

import pytest
from torch import nn

from parsedec.models.turns import share_turns, turns_of


def started(*calls):
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_one_that_changes_the_model_has_it_to_itself():
    turns, inside, seen = turns_of(nn.Linear(1, 1)), [], []

    def run(turn, name):
        for _ in range(30):
            with turn():
                inside.append(name)
                seen.append(tuple(inside))
                time.sleep(0.0002)
                inside.remove(name)

    threads = started(*(lambda name=i: run(turns.plain, name) for i in range(3)),
                      *(lambda name=f"alone {i}": run(turns.alone, name) for i in range(2)))  # fmt: skip
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(len(now) == 1 for now in seen if any(str(name).startswith("alone") for name in now))
    assert max(map(len, seen)) > 1, "plain ones are made side by side"


def test_plain_ones_within_a_plain_one_do_not_wait_for_one_that_does():
    turns = turns_of(nn.Linear(1, 1))
    waits = threading.Event()

    def alone():
        waits.set()
        with turns.alone():
            pass

    with turns.plain():
        (thread,) = started(alone)
        waits.wait(5)
        time.sleep(0.02)
        with turns.plain():
            assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()


def test_a_turn_ends_with_an_error():
    turns = turns_of(nn.Linear(1, 1))
    for turn in (turns.plain, turns.alone):
        with pytest.raises(ZeroDivisionError), turn():
            _ = 1 / 0
    with turns.alone():
        pass


def test_they_are_a_models_own_and_go_with_it():
    model, view = nn.Linear(1, 1), nn.Linear(1, 1)
    assert turns_of(model) is turns_of(model) is not turns_of(view)
    share_turns(view, model)
    assert turns_of(view) is turns_of(model)
    gone = weakref.ref(turns_of(model))
    del model, view
    gc.collect()
    assert gone() is None
