"""One activity's end of the mail: what it sends, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from lasgd.algorithms.requests import Box, Message, Receive, Send, Stop
from lasgd.errors import PeerError
from lasgd.group.base import Mail
from lasgd.pace import Pace

LOOK_S = 0.05
"""While it waits for a message, how often it looks whether there is still something to wait for."""


class Postbox:
    """Used by one thread."""

    def __init__(
        self, mail: Mail, box: Box, pace: Pace, is_over: Callable[[], bool], timeout_s: float, where: Callable[[], str]
    ):
        """`is_over`: this rank has failed or is being closed, nothing more will come. `where` is for messages."""
        self._mail, self._box, self._pace = mail, box, pace
        self._is_over, self._timeout_s, self._where = is_over, timeout_s, where

    def send(self, request: Send) -> None:
        """Carries a Send out."""
        self._mail.send(request.peer, request.to, request.values, request.weight, request.note)

    def wait_receive(self, request: Receive) -> Message | Stop:
        """Carries a Receive out. Raises PeerError where a peer has been silent for `timeout_s`.

        For a message from anybody it waits until there is one: that the others are alive is seen in their rounds.
        """
        begin_s = time.monotonic()
        while True:
            is_last_look = self._is_over() or (request.until_end and self._pace.end is not None)
            letter = self._mail.wait_receive(self._box, request.peer, 0.0 if is_last_look else LOOK_S)
            if letter is not None:
                return Message(letter.source, letter.values, letter.weight, letter.note)
            if is_last_look:
                return Stop()
            if request.peer is not None and time.monotonic() - begin_s > self._timeout_s:
                raise PeerError(
                    f"{self._where()}: no message from rank {request.peer} within {self._timeout_s:g} s, whose process "
                    "still answers in rounds. Raise timeout_s if its local steps or its link are so slow; see "
                    "docs/footguns.md#silent-rank"
                )
