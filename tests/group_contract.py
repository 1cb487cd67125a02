"""What every Group must do. Subclass with a `make` and pytest collects the claims for it:

class TestMine(GroupContract):
    def make(self, world_size): return [function that joins and returns rank r's group, for each rank]
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pytest
import torch

from helpers import LIMIT_S, raise_any, wait_all
from lasgd.errors import PeerError
from lasgd.group.base import Group, GroupWithPieces

SHORT_S = 0.3
"""For waits that are to end in a time-out."""


class GroupContract:
    """The claims."""

    def make(self, world_size: int) -> list[Callable[[], Group]]:
        raise NotImplementedError

    def on_all(self, world_size: int, body: Callable[[Group], object]) -> list:
        """body(group) on every rank, each in a thread; results or exceptions, by rank. Leaves afterwards."""
        all_done = threading.Barrier(world_size)

        def rank(join) -> object:
            group = join()
            try:
                return body(group)
            finally:
                all_done.wait(LIMIT_S)
                group.leave()

        return wait_all([lambda join=join: rank(join) for join in self.make(world_size)])

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sums_are_exact_where_they_can_be_and_bit_identical_everywhere(self, world_size, dtype):
        def body(group: Group):
            header = torch.zeros(world_size, 3, dtype=torch.float64)
            header[group.rank] = torch.tensor([2.0**24 + 1, group.rank, 2.0**53 - 1], dtype=torch.float64)
            exact = torch.arange(100, dtype=dtype) * (group.rank + 1)
            inexact = torch.randn(1001, dtype=dtype, generator=torch.Generator().manual_seed(group.rank))
            group.wait_all_reduce(header, exact, LIMIT_S)
            group.wait_all_reduce(torch.zeros(1, dtype=torch.float64), inexact, LIMIT_S)
            return header, exact, inexact

        results = raise_any(self.on_all(world_size, body))
        expected = torch.tensor([[2.0**24 + 1, rank, 2.0**53 - 1] for rank in range(world_size)], dtype=torch.float64)
        true = sum(
            torch.randn(1001, dtype=dtype, generator=torch.Generator().manual_seed(rank)).double()
            for rank in range(world_size)
        )
        for header, exact, inexact in results:
            assert torch.equal(header, expected)
            assert torch.equal(exact, torch.arange(100, dtype=dtype) * sum(range(1, world_size + 1)))
            assert torch.equal(inexact, results[0][2])
            torch.testing.assert_close(inexact.double(), true, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_the_header_arrives_no_later_than_the_vector_and_both_within_the_call(self, world_size):
        def body(group: Group):
            begin_s = time.monotonic()
            joined_s, arrived_s = group.wait_all_reduce(
                torch.zeros(world_size, 2, dtype=torch.float64), torch.ones(50_000), LIMIT_S
            )
            return begin_s, joined_s, arrived_s, time.monotonic()

        times = raise_any(self.on_all(world_size, body))
        for begin_s, joined_s, arrived_s, end_s in times:
            assert begin_s <= joined_s <= arrived_s <= end_s
        assert min(joined for _, joined, _, _ in times) >= max(begin for begin, _, _, _ in times)

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_pieces_go_where_they_are_addressed_and_come_from_everybody(self, world_size):
        def body(group: Group):
            assert isinstance(group, GroupWithPieces)
            header = torch.zeros(world_size, 1, dtype=torch.float64)
            header[group.rank] = group.rank + 0.5
            pieces = torch.tensor([[group.rank, k, 7] for k in range(world_size)], dtype=torch.uint8)
            received, everything = torch.zeros_like(pieces), torch.zeros_like(pieces)
            begin_s = time.monotonic()
            joined_s, arrived_s = group.wait_all_to_all(header, pieces, received, LIMIT_S)
            gathered_s = group.wait_all_gather(received[group.rank], everything, LIMIT_S)
            assert begin_s <= joined_s <= arrived_s <= gathered_s <= time.monotonic()
            return header.view(-1).tolist(), received.tolist(), everything.tolist()

        for rank, (header, received, everything) in enumerate(raise_any(self.on_all(world_size, body))):
            assert header == [r + 0.5 for r in range(world_size)]
            assert received == [[r, rank, 7] for r in range(world_size)]
            assert everything == [[r, r, 7] for r in range(world_size)]

    def test_bytes_of_pieces_are_counted_but_for_the_own(self):
        def body(group: Group):
            assert isinstance(group, GroupWithPieces)
            pieces = torch.zeros(3, 100, dtype=torch.uint8)
            group.wait_all_to_all(torch.zeros(3, 1, dtype=torch.float64), pieces, pieces.clone(), LIMIT_S)
            group.wait_all_gather(pieces[0], pieces.clone(), LIMIT_S)
            return group.bytes_sent

        assert raise_any(self.on_all(3, body)) == [2 * 2 * 24 // 3 + 2 * 200] * 3

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_a_broadcast_gives_all_the_sources_bytes(self, world_size):
        def body(group: Group):
            tensor = torch.full((10,), group.rank, dtype=torch.uint8)
            group.wait_broadcast(tensor, world_size - 1, LIMIT_S)
            return tensor.tolist()

        assert raise_any(self.on_all(world_size, body)) == [[world_size - 1] * 10] * world_size

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_an_exchange_gives_all_every_value_in_the_order_of_ranks(self, world_size):
        def body(group: Group):
            first = group.wait_exchange("first", b"%d" % group.rank, LIMIT_S)
            empty = group.wait_exchange("second", b"" if group.rank else b"-\x00\xff", LIMIT_S)
            return first, empty

        values = [b"%d" % rank for rank in range(world_size)]
        empties = [b"-\x00\xff"] + [b""] * (world_size - 1)
        assert raise_any(self.on_all(world_size, body)) == [(values, empties)] * world_size

    def test_ranks_members_and_epoch_are_known_and_bytes_are_counted(self):
        def body(group: Group):
            header, vector = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(300)
            group.wait_all_reduce(header, vector, LIMIT_S)
            return group.rank, group.world_size, group.members, group.epoch, group.bytes_sent

        assert raise_any(self.on_all(3, body)) == [(r, 3, (0, 1, 2), 0, 2 * 2 * (1200 + 24) // 3) for r in range(3)]

    def test_many_rounds_of_changing_size_keep_their_order(self):
        def body(group: Group):
            sums = []
            for round_ in range(30):
                vector = torch.full((1 + round_ % 7,), float(round_))
                group.wait_all_reduce(torch.zeros(2, 1, dtype=torch.float64), vector, LIMIT_S)
                sums.append(vector[0].item())
            return sums

        assert raise_any(self.on_all(2, body)) == [[2.0 * r for r in range(30)]] * 2

    def test_leaving_right_after_the_last_collective_disturbs_nobody(self):
        def rank(join):
            group = join()
            vector = torch.ones(200_000)
            for _ in range(3):
                group.wait_all_reduce(torch.zeros(3, 1, dtype=torch.float64), vector, LIMIT_S)
            group.leave()
            return vector[0].item()

        assert wait_all([lambda join=join: rank(join) for join in self.make(3)]) == [27.0] * 3

    @pytest.mark.parametrize("absent", [0, 2])
    def test_a_member_that_does_not_come_is_named_within_the_time_out(self, absent):
        def body(group: Group):
            group.wait_all_reduce(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(5), LIMIT_S)  # all have started
            if group.rank == absent:
                return None
            begin_s = time.monotonic()
            with pytest.raises(PeerError, match=rf"(?i)silent: (rank )?\[?{absent}\b") as caught:
                group.wait_all_reduce(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(5), SHORT_S)
            return time.monotonic() - begin_s, str(caught.value)

        for result in raise_any(self.on_all(3, body)):
            assert result is None or result[0] < SHORT_S + 6

    def test_a_reason_left_behind_reaches_the_others_message(self):
        def body(group: Group):
            if group.rank == 1:
                group.leave("ValueError: too many bananas")
                return None
            with pytest.raises(PeerError, match="Rank 1 left: ValueError: too many bananas"):
                for _ in range(3):
                    group.wait_all_reduce(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(5), LIMIT_S)
            return None

        begin_s = time.monotonic()
        raise_any(self.on_all(3, body))
        assert time.monotonic() - begin_s < LIMIT_S / 2  # at once, not after the time-out

    def test_leaving_twice_is_harmless_and_a_collective_afterwards_is_a_peer_error(self):
        def body(group: Group):
            group.leave("first")
            group.leave()
            with pytest.raises(PeerError):
                group.wait_all_reduce(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(1), SHORT_S)

        raise_any(self.on_all(2, body))

    def test_leaving_while_a_collective_of_the_own_rank_is_on_its_way_does_not_wait_for_it(self):
        left = threading.Event()

        def body(group: Group):
            def collective() -> None:
                with contextlib.suppress(PeerError):
                    group.wait_all_reduce(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(5), LIMIT_S)

            if group.rank == 1:  # comes only when rank 0 has left
                assert left.wait(LIMIT_S)
                collective()
                return None
            thread = threading.Thread(target=collective, daemon=True)
            thread.start()
            thread.join(0.05)
            begin_s = time.monotonic()
            group.leave("closing")
            left_after_s = time.monotonic() - begin_s
            left.set()
            thread.join(LIMIT_S)
            return left_after_s, thread.is_alive()

        left_after_s, is_alive = raise_any(self.on_all(2, body))[0]
        assert left_after_s < 4.0
        assert not is_alive

    def test_it_offers_the_whole_contract(self):
        assert raise_any(self.on_all(1, lambda group: isinstance(group, Group))) == [True]
