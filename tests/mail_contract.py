"""What every Mail must do. Subclass with a `make` and pytest collects the claims for it:

class TestMine(MailContract):
    def make(self, world_size): return [rank 0's mail, rank 1's, ...]
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from helpers import LIMIT_S
from lasgd.group.base import Mail

SHORT_S = 0.05


class MailContract:
    """The claims."""

    def make(self, world_size: int) -> list[Mail]:
        raise NotImplementedError

    @contextlib.contextmanager
    def mails(self, world_size: int) -> Iterator[list[Mail]]:
        mails = self.make(world_size)
        try:
            yield mails
        finally:
            for mail in mails:
                mail.leave()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_a_letter_arrives_as_it_was_when_it_was_sent(self, dtype):
        with self.mails(2) as (first, second):
            values = torch.arange(1001, dtype=dtype)
            first.send(1, 1, values, weight=0.25, note=-7)
            values.zero_()
            letter = second.wait_receive(1, 0, LIMIT_S)
        assert letter is not None and letter.values is not None
        assert torch.equal(letter.values, torch.arange(1001, dtype=dtype))
        assert (letter.source, letter.weight, letter.note) == (0, 0.25, -7)

    def test_what_arrives_is_the_receivers_to_change(self):
        with self.mails(1) as (mail,):
            mail.send(0, 0, torch.ones(3), 1.0, 0)
            letter = mail.wait_receive(0, 0, LIMIT_S)
            assert letter is not None and letter.values is not None
            assert torch.equal(letter.values.mul_(2), torch.full((3,), 2.0))

    def test_letters_of_one_sender_arrive_in_their_order_whatever_their_size(self):
        with self.mails(2) as (first, second):
            for number in range(20):
                first.send(1, 0, torch.zeros(100_000 if number % 2 else 1), 1.0, number)
            letters = [second.wait_receive(0, None, LIMIT_S) for _ in range(20)]
        assert [letter.note for letter in letters if letter] == list(range(20))

    def test_a_letter_of_another_peer_waits_until_somebody_asks_for_it(self):
        with self.mails(3) as (first, second, third):
            first.send(2, 0, None, 1.0, 10)
            second.send(2, 0, None, 1.0, 11)
            first.send(2, 0, None, 1.0, 12)
            asked = [third.wait_receive(0, peer, LIMIT_S) for peer in (1, 0, None)]
        assert [letter.note for letter in asked if letter] == [11, 10, 12]

    def test_boxes_are_apart(self):
        with self.mails(2) as (first, second):
            first.send(1, 0, None, 1.0, 5)
            assert second.wait_receive(1, None, SHORT_S) is None
            letter = second.wait_receive(0, None, LIMIT_S)
            assert letter is not None and letter.note == 5

    def test_no_letter_in_time_is_none(self):
        with self.mails(2) as (first, _):
            assert first.wait_receive(0, None, SHORT_S) is None
            assert first.wait_receive(0, 1, 0.0) is None

    def test_a_letter_wakes_who_waits_for_it(self):
        with self.mails(2) as (first, second):
            found = []
            waiting = threading.Thread(target=lambda: found.append(second.wait_receive(0, 0, LIMIT_S)), daemon=True)
            waiting.start()
            first.send(1, 0, None, 1.0, 3)
            waiting.join(LIMIT_S)
            assert [letter.note for letter in found] == [3]

    def test_only_what_goes_to_others_counts_as_sent(self):
        with self.mails(2) as (first, _):
            first.send(0, 0, torch.zeros(1000), 1.0, 0)
            assert first.bytes_sent == 0
            first.send(1, 0, torch.zeros(1000), 1.0, 0)
            assert 4000 <= first.bytes_sent < 4100

    def test_leaving_twice_is_harmless_and_letters_after_it_go_nowhere(self):
        with self.mails(2) as (first, _):
            first.leave()
            first.send(1, 0, None, 1.0, 0)
            first.leave()
