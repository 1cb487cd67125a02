"""Files written beside the training: in order, never in its way, and no error ends it."""

from __future__ import annotations

import threading

from lasgd.errors import LasgdError
from lasgd.training.writer import BackgroundWriter


def test_jobs_are_done_in_order_before_the_wait_ends():
    done: list[int] = []
    writer = BackgroundWriter(report=lambda text: None, capacity=10)
    for number in range(5):
        assert writer.submit(lambda number=number: done.append(number))
    assert writer.wait_written(10)
    assert done == [0, 1, 2, 3, 4]
    assert writer.wait_written(10)  # twice is harmless


def test_a_slow_disk_refuses_jobs_at_once_and_takes_one_from_whoever_waits():
    is_free, reported, done = threading.Event(), [], []
    writer = BackgroundWriter(reported.append, capacity=1)
    writer.submit(is_free.wait)
    assert writer.wait_submit(lambda: done.append("second"), 10)  # takes the place of the first, which has begun
    assert not writer.submit(lambda: done.append("left out"))
    assert not writer.wait_submit(lambda: done.append("left out"), 0.01)
    assert not writer.wait_written(0.01)
    threading.Timer(0.01, is_free.set).start()
    assert writer.wait_submit(lambda: done.append("third"), 10)
    assert writer.wait_written(10)
    assert done == ["second", "third"]


def test_an_error_is_reported_and_the_next_job_done():
    reported, done = [], []
    writer = BackgroundWriter(reported.append, capacity=3)

    def fail(error: Exception) -> None:
        raise error

    writer.submit(lambda: fail(LasgdError("a.pt could not be written")))
    writer.submit(lambda: fail(OSError(28, "No space left on device")))
    writer.submit(lambda: done.append(True))
    assert writer.wait_written(10)
    assert reported == ["a.pt could not be written", "OSError: [Errno 28] No space left on device"]
    assert done == [True]
