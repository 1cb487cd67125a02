"""A clock and its `sleep`, for what is told which ones to use."""

from __future__ import annotations


class VirtualClock:
    """Stands still but for sleeps, each of which wakes `late_s` late."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 50.0
        self.late_s = late_s
        self.sleeps = 0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.sleeps += 1
        self.now_s += seconds + self.late_s
