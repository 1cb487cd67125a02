"""The phase table: every sequence of events."""

from __future__ import annotations

import itertools

import pytest

from lasgd.errors import ProtocolError
from lasgd.runtime import phase
from lasgd.runtime.phase import MOVES, Phase, PhaseTable

EVENTS = ("start", "agree_end", "average", "fail", "close")


def test_every_sequence_of_up_to_six_events_follows_the_table_and_an_illegal_move_changes_nothing():
    for length in range(7):
        for events in itertools.product(EVENTS, repeat=length):
            table, expected = PhaseTable("rank 0 of 1"), Phase.READY
            for event in events:
                if (expected, event) in MOVES:
                    expected = MOVES[expected, event]
                    assert table.move(event, 1) is expected
                else:
                    with pytest.raises(ProtocolError):
                        table.move(event, 1)
                assert table.now is expected


def test_an_illegal_move_names_rank_round_event_and_phase():
    with pytest.raises(ProtocolError, match=r"rank 3 of 8: round 17: 'average' cannot happen when ready"):
        PhaseTable("rank 3 of 8").move("average", 17)


def test_closing_is_possible_in_every_phase_and_final():
    assert {before for before, event in MOVES if event == "close"} == set(Phase)
    assert {after for (before, _), after in MOVES.items() if before is Phase.CLOSED} == {Phase.CLOSED}
    assert (Phase.CLOSED, "start") not in MOVES


def test_the_communicators_late_events_find_a_closed_table_and_change_nothing():
    for event in ("agree_end", "average", "fail"):
        assert MOVES[Phase.CLOSED, event] is Phase.CLOSED


def test_every_phase_is_reachable_and_drawn():
    assert set(MOVES.values()) | {Phase.READY} == set(Phase)
    assert all(each.value in phase.__doc__ for each in Phase)
