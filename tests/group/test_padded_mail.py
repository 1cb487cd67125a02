"""Letters over emulated links, on a clock that only the test moves."""

from __future__ import annotations

import pytest
import torch

from lasgd.group.base import Letter
from lasgd.group.padded import EmulatedLink
from lasgd.group.padded_mail import HEAD_BYTES, PaddedMail

SIZE = 1000
BYTES = 4 * SIZE + HEAD_BYTES
RATE = 1e4
SECONDS = BYTES / RATE


class Wire:
    """Connects mails without delay; who waits lets time pass."""

    def __init__(self):
        self.now_s = 100.0
        self.boxes: dict[tuple[int, int], list[Letter]] = {}

    def clock(self) -> float:
        return self.now_s


class FakeMail:
    bytes_sent = 0

    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank = wire, rank

    def send(self, peer, box, values, weight, note, due_s=0.0):
        self.wire.boxes.setdefault((peer, box), []).append(Letter(self.rank, values, weight, note, due_s))

    def wait_receive(self, box, peer, timeout_s):
        found = self.wire.boxes.get((self.rank, box), [])
        if found:
            return found.pop(0)
        self.wire.now_s += timeout_s
        return None

    def leave(self):
        pass


def mails(world_size=3, latency_s=0.0, **link):
    wire = Wire()
    emulated = EmulatedLink(
        4 * SIZE, link.get("round_s"), link.get("rate", RATE), latency_s, wire.clock, lambda s: None
    )
    return wire, [PaddedMail(FakeMail(wire, r), r, world_size, emulated, wire.clock) for r in range(world_size)]


def arrival_s(wire, mail, peer=None) -> float:
    assert mail.wait_receive(0, peer, 1e6) is not None
    return wire.now_s - 100.0


def test_a_letter_takes_its_bytes_through_the_link_and_the_latency():
    wire, (first, second, _) = mails(latency_s=0.5)
    first.send(1, 0, torch.zeros(SIZE), 1.0, 0)
    assert arrival_s(wire, second) == pytest.approx(SECONDS + 0.5)


def test_letters_of_a_rank_leave_one_after_the_other():
    wire, (first, second, third) = mails()
    first.send(1, 0, torch.zeros(SIZE), 1.0, 0)
    first.send(2, 0, torch.zeros(SIZE), 1.0, 0)
    assert arrival_s(wire, second) == pytest.approx(SECONDS)
    assert arrival_s(wire, third) == pytest.approx(2 * SECONDS)


def test_letters_to_one_rank_come_in_one_after_the_other():
    wire, (first, second, third) = mails()
    first.send(2, 0, torch.zeros(SIZE), 1.0, 0)
    second.send(2, 0, torch.zeros(SIZE), 1.0, 0)
    assert arrival_s(wire, third, peer=0) == pytest.approx(SECONDS)
    assert arrival_s(wire, third, peer=1) == pytest.approx(2 * SECONDS)


def test_a_letter_that_nobody_asked_for_has_arrived_meanwhile():
    wire, (first, second, _) = mails()
    first.send(1, 0, torch.zeros(SIZE), 1.0, 0)
    wire.now_s += 10
    assert arrival_s(wire, second) == pytest.approx(10)


def test_a_time_out_ends_the_waiting_and_not_the_letter():
    wire, (first, second, _) = mails()
    first.send(1, 0, torch.zeros(SIZE), 1.0, 0)
    assert second.wait_receive(0, None, SECONDS / 4) is None
    assert wire.now_s - 100.0 == pytest.approx(SECONDS / 4)
    assert arrival_s(wire, second) == pytest.approx(SECONDS)


def test_a_letter_to_oneself_costs_nothing():
    wire, (first, *_) = mails(latency_s=0.5)
    first.send(0, 0, torch.zeros(SIZE), 1.0, 0)
    assert arrival_s(wire, first) == 0.0


def test_where_only_the_round_is_known_a_letter_takes_as_long_as_on_links_where_a_ring_would():
    # A ring of 3 sends 2 * 2/3 vectors in a round of 2 s: one vector takes 1.5 s.
    wire, (first, second, _) = mails(round_s=2.0, rate=None)
    first.send(1, 0, torch.zeros(SIZE), 1.0, 0)
    assert arrival_s(wire, second) == pytest.approx(1.5 * BYTES / (4 * SIZE))
