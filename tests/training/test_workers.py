import multiprocessing
import os
import select
import signal
from itertools import count

import pytest
import torch

from lasgd.errors import DataError
from lasgd.training.workers import InOrder

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
]


class Squares:
    def __getitem__(self, key: int) -> int | DataError:
        return DataError("no square for 13") if key == 13 else key * key


class Pids:
    def __getitem__(self, key: int) -> tuple[int, int]:
        return os.getpid(), torch.get_num_threads()


def workers_alive() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whatever_the_number_of_workers(workers):
    with InOrder(Squares(), range(10), workers) as results:
        assert list(results) == [key * key for key in range(10)]


def test_work_is_done_by_processes_of_one_thread_each():
    with InOrder(Pids(), range(20), 2) as results:
        seen = set(results)
    assert {threads for _, threads in seen} == {1}
    assert os.getpid() not in {pid for pid, _ in seen}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_source_arrives_as_itself_and_in_its_place(workers):
    results = InOrder(Squares(), count(11), workers)
    assert [next(results), next(results)] == [121, 144]
    with pytest.raises(DataError, match=r"^no square for 13$"):
        next(results)
    assert not workers_alive()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_worker_outlives_a_block_that_fails(error):
    with pytest.raises(error), InOrder(Squares(), count(20), 2) as results:
        next(results)
        assert len(workers_alive()) == 2
        raise error
    assert not workers_alive()


def test_closing_twice_is_harmless_and_ends_the_iteration():
    results = InOrder(Squares(), count(20), 1)
    next(results)
    results.close()
    results.close()
    assert list(results) == []
    assert not workers_alive()


def test_workers_leave_ctrl_c_to_the_main_process():
    with InOrder(Squares(), count(20), 2, ahead=2) as results:
        for pid in workers_alive():  # before the first result: perhaps before their first instruction, too
            os.kill(pid, signal.SIGINT)
        assert [next(results) for _ in range(20)] == [key * key for key in range(20, 40)]
        for pid in workers_alive():
            os.kill(pid, signal.SIGINT)
        assert [next(results) for _ in range(20)] == [key * key for key in range(40, 60)]


def test_a_worker_that_dies_is_met_at_the_next_result_and_nowhere_else():
    results = InOrder(Squares(), count(20), 1, ahead=2)
    next(results)
    (pid,) = workers_alive()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead for certain, and no exception has come out of the blue
    with pytest.raises(DataError, match=r"a worker process that reads images died.*--workers"):
        for _ in range(10):
            next(results)
    assert not workers_alive()


def test_the_training_s_generator_and_signals_are_left_alone():
    def signals() -> tuple:
        return *map(signal.getsignal, (signal.SIGINT, signal.SIGCHLD)), signal.pthread_sigmask(signal.SIG_BLOCK, [])

    torch.manual_seed(0)
    before = torch.get_rng_state(), signals()
    with InOrder(Squares(), count(20), 1) as results:
        next(results)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert signals() == before[1]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_workers_die_with_a_main_process_that_is_killed():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    main = context.Process(target=_start_workers_and_wait, args=(sender,))
    main.start()
    watched = [os.pidfd_open(pid) for pid in receiver.recv()]
    main.kill()
    main.join(10)
    for worker in watched:
        assert select.select([worker], [], [], 3) == ([worker], [], []), "a worker lives on"
        os.close(worker)


def _start_workers_and_wait(sender) -> None:
    results = InOrder(Squares(), count(20), 2)
    next(results)
    sender.send(workers_alive())
    signal.pause()
