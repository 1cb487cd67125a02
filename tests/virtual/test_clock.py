"""What the virtual-time driver's clock promises: the order in which things happen."""

from __future__ import annotations

import math
from itertools import count, groupby
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError
from lasgd.virtual.clock import Clock


class Note:
    """Writes down that it has acted, and when; then does something else."""

    def __init__(self, clock: Clock, written: list, name, then=lambda: None):
        self.clock, self.written, self.name, self.then = clock, written, name, then

    def act(self, actor) -> None:
        assert actor is self
        self.written.append((self.clock.now_s, self.name))
        self.then()


def test_what_is_foreseen_for_one_moment_happens_in_the_order_of_foresight():
    clock, written = Clock(), []
    for name in "abcd":
        clock.at(1.0, Note(clock, written, name))
    clock.run()
    assert written == [(1.0, name) for name in "abcd"]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0000000000000002, 3.0]), max_size=12))
def test_moments_come_in_the_order_of_time_whatever_the_order_of_foresight(moments):
    clock, written = Clock(), []
    for name, moment in enumerate(moments):
        clock.at(moment, Note(clock, written, name))
    clock.run()
    assert written == sorted((moment, name) for name, moment in enumerate(moments))


def test_what_is_added_for_the_present_moment_happens_in_it_after_all_that_was_to_happen_already():
    clock, written = Clock(), []
    first = Note(clock, written, "first", lambda: clock.at(clock.now_s, Note(clock, written, "added")))
    clock.at(2.0, first)
    clock.at(2.0, Note(clock, written, "second"))
    clock.at(3.0, Note(clock, written, "later"))
    clock.run()
    assert written == [(2.0, "first"), (2.0, "second"), (2.0, "added"), (3.0, "later")]


def test_something_can_happen_again_and_again_at_one_moment_without_time_going_on():
    clock, written, left = Clock(), [], [5]

    def again() -> None:
        left[0] -= 1
        if left[0]:
            clock.at(clock.now_s, note)

    note = Note(clock, written, "again", again)
    clock.at(1.0, note)
    clock.run()
    assert written == [(1.0, "again")] * 5


def test_a_clock_with_nothing_to_come_stands_still():
    clock = Clock()
    clock.run()
    assert clock.now_s == 0.0


@pytest.mark.parametrize("moment", [math.inf, math.nan, 0.5, -1.0])
def test_a_moment_that_never_comes_or_is_past_is_refused(moment):
    clock, written = Clock(), []
    clock.at(1.0, Note(clock, written, "one", lambda: clock.at(moment, Note(clock, written, "never"))))
    with pytest.raises(ConfigurationError, match=r"virtual time 1 s: something would happen at (inf|nan|0\.5|-1) s"):
        clock.run()


def test_ranks_that_are_equal_act_in_the_order_of_ranks_for_ever():
    clock, written = Clock(), []

    def ticking(rank: int) -> Note:
        note = Note(clock, written, rank, lambda: clock.now_s < 5 and clock.at(clock.now_s + 0.1, note))
        return note

    for rank in range(3):
        clock.at(0.1, ticking(rank))
    clock.run()
    for _, acting in groupby(written, lambda event: event[0]):
        assert [rank for _, rank in acting] == [0, 1, 2]


def test_thousands_of_moments_come_in_order_whatever_windows_they_fall_into():
    clock = Clock()
    random = Random(7)
    happened: list[tuple[float, int]] = []
    foreseen = count()

    class Again:
        """Acts a few times, after pauses of very different lengths, some of them equal."""

        def __init__(self, times: int):
            self.times, self.order = times, -1

        def act(self, _) -> None:
            happened.append((clock.now_s, self.order))
            if self.times:
                self.times -= 1
                self.plan(clock.now_s + random.choice([0.0, 1e-9, 0.125, random.random(), 1000 * random.random()]))

        def plan(self, time_s: float) -> None:
            self.order = next(foreseen)
            clock.at(time_s, self)

    for number in range(3000):
        Again(5).plan(0.25 * (number % 7) if number % 2 else random.random())
    clock.run()
    assert len(happened) == 3000 * 6
    assert happened == sorted(happened), "by time, and at the same moment in the order of foresight"
