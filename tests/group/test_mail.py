"""The mail's contract, over the scripted network and over ZeroMQ; and what ZeroMQ's mail refuses."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch
import zmq

from helpers import LIMIT_S, raise_any, wait_all
from lasgd.errors import PeerError
from lasgd.group.scripted import Network
from lasgd.group.zmq_mail import _HEAD, ZmqMail, own_address
from mail_contract import SHORT_S, MailContract


def zmq_mails(world_size: int) -> list[ZmqMail]:
    told: dict[int, bytes] = {}
    all_told = threading.Barrier(world_size)

    def exchange(rank: int, own: bytes) -> list[bytes]:
        told[rank] = own
        all_told.wait(LIMIT_S)
        return [told[r] for r in range(world_size)]

    return raise_any(
        wait_all(
            [
                lambda rank=rank: ZmqMail(rank, world_size, "127.0.0.1", lambda own: exchange(rank, own))
                for rank in range(world_size)
            ]
        )
    )


class TestScripted(MailContract):
    def make(self, world_size):
        network = Network(world_size, deliver_at_once=True)
        return [network.group(rank).wait_mail(LIMIT_S) for rank in range(world_size)]


class TestZmq(MailContract):
    def make(self, world_size):
        return list(zmq_mails(world_size))


def test_a_stranger_who_does_not_know_the_secret_is_not_heard():
    first, second = zmq_mails(2)
    there = second._directory[1]
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.setsockopt(zmq.LINGER, 1000)
        stranger.connect(f"tcp://127.0.0.1:{there.ports[0]}")
        forged = _HEAD.pack(b"?" * 16, 0, 1, 1.0, 0, 0.0)
        for frames in ([b"nonsense"], [forged, torch.ones(4).numpy().tobytes()], [forged]):
            stranger.send_multipart(frames)
        first.send(1, 0, None, 1.0, 1)
        letter = second.wait_receive(0, None, LIMIT_S)
        assert letter is not None and letter.note == 1
        assert second.wait_receive(0, None, SHORT_S) is None
    for mail in (first, second):
        mail.leave()


def test_a_rank_listens_where_the_named_interface_is_and_on_the_way_to_the_master_otherwise():
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)
    )
    assert own_address("", loopback) == "127.0.0.1"
    assert own_address("127.0.0.1", None) == "127.0.0.1"


def test_an_interface_without_address_and_an_address_of_nobody_are_named():
    with pytest.raises(PeerError, match=r"interface 'wire9' \(GLOO_SOCKET_IFNAME\) has no address"):
        own_address("127.0.0.1", "wire9")
    with pytest.raises(PeerError, match=r"rank 3: cannot listen on 203\.0\.113\.7 .*GLOO_SOCKET_IFNAME"):
        ZmqMail(3, 4, "203.0.113.7", lambda own: [own])
