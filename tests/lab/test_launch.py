"""Ranks that live and die together: real processes, but with a fake rank that only says where it is and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lasgd.errors import ConfigurationError, DataError, LasgdError, PeerError
from lasgd.lab import network
from lasgd.lab.launch import launch
from lasgd.training.run_folder import read_run
from lasgd.training.settings import Settings

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]

FAKE = ("-m", "lasgd.lab.rank_process", "fake_rank")
FAKE_RANK = """
import json, os, signal, socket, sys, time
from pathlib import Path
from lasgd.errors import ConfigurationError, DataError, PeerError

rank, lines = os.environ["RANK"], []

def connect(who):
    line = socket.create_connection(("127.0.0.1", int(os.environ["FAKE_PORT"])))
    hello = {"who": who, "pid": os.getpid(), "argv": sys.argv[1:], "environment": dict(os.environ)}
    line.sendall((json.dumps(hello) + "\\n").encode())
    lines.append(line)  # open until this process is gone
    return line

def wait():
    while True:
        signal.pause()

behaviours = json.loads(os.environ["FAKE_BEHAVIOUR"])
behaviour = behaviours.get(rank, behaviours["other"])
line = connect(rank)
logs = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent
(logs / f"here-{rank}").touch()
while not all((logs / f"here-{other}").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)  # nobody fails before all are there

def interrupted(signum, frame):
    line.sendall(b"interrupted\\n")
    sys.exit(130)

if behaviour == "raise":
    raise ValueError("boom")
if behaviour == "raise ours":
    raise DataError("a folder is missing.")
if behaviour == "refuse":
    raise ConfigurationError("the checkpoint cannot be read")
if behaviour == "blame":
    raise PeerError("somebody is silent")
if behaviour == "raise after the blame":
    while not (logs / "rank-0.error.json").exists():
        time.sleep(0.01)
    raise ValueError("boom")
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "code":
    print("some last words")
    sys.exit(3)
if behaviour == "killed with worker":
    reader, writer = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        line.close()
        connect("worker")
        os.write(writer, b"x")
        wait()
    os.read(reader, 1)
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "wait":
    signal.signal(signal.SIGINT, interrupted)
    line.sendall(b"ready\\n")
    wait()
if behaviour == "not yet training":
    line.sendall(b"ready\\n")
    wait()
if behaviour == "deaf":
    signal.signal(signal.SIGINT, lambda *_: line.sendall(b"interrupted\\n"))
    signal.signal(signal.SIGTERM, lambda *_: line.sendall(b"terminated\\n"))
    line.sendall(b"ready\\n")
    wait()
"""


class Line:
    """One fake process, heard over a socket that closes when the process is gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        self._file = connection.makefile("r")
        self._connection = connection
        hello = json.loads(self._file.readline())
        self.who: str = hello["who"]
        self.pid: int = hello["pid"]
        self.argv: list[str] = hello["argv"]
        self.environment: dict[str, str] = hello["environment"]

    def next(self) -> str:
        try:
            return self._file.readline().strip()
        except ConnectionResetError:
            return ""

    def rest(self) -> list[str]:
        """What it said until it was gone; raises TimeoutError if it stays."""
        said = []
        while word := self.next():
            said.append(word)
        return said

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class Fakes:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "fake_rank.py").write_text(FAKE_RANK)
        self.out = folder / "out"
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(30)
        self._lines: list[Line] = []
        path = os.pathsep.join([str(folder), *filter(None, sys.path)])
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("FAKE_PORT", str(self._server.getsockname()[1]))
        self._monkeypatch = monkeypatch

    def behave(self, **behaviours: str) -> None:
        named = {name.removeprefix("rank_"): value for name, value in behaviours.items()}
        self._monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps(named))

    def lines(self, n: int) -> dict[str, Line]:
        """The lines of `n` processes."""
        new = [Line(self._server.accept()[0]) for _ in range(n)]
        self._lines += new
        return {line.who: line for line in new}

    def launch(self, world_size: int, **options: float) -> int:
        return launch(Settings(), self.out, None, world_size, command=FAKE, **options)

    @contextlib.contextmanager
    def parent(self, world_size: int, grace_s: float = 5.0):
        """The launcher in a process of its own, in its own session, so that signals to it reach nobody else."""
        program = (
            "import sys\nfrom pathlib import Path\nfrom lasgd.errors import LasgdError\n"
            "from lasgd.lab.launch import launch\nfrom lasgd.training.settings import Settings\n"
            f"try: code = launch(Settings(), Path({str(self.out)!r}), None, {world_size}, command={FAKE!r}, "
            f"grace_s={grace_s})\n"
            "except LasgdError as error: print(error, file=sys.stderr); code = 1\n"
            "sys.exit(code)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._server.close()


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path, monkeypatch)
    yield fakes
    fakes.close()


def test_ranks_that_end_well_return_zero_and_know_their_place(fakes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fakes.behave(other="end")
    assert fakes.launch(3) == 0
    lines = fakes.lines(3)
    cores = len(os.sched_getaffinity(0))
    for rank in range(3):
        line = lines[str(rank)]
        assert line.rest() == []
        assert line.argv == [str(fakes.out), "--link-emulation", "none"]
        place = {name: line.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        assert place == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        assert line.environment["MASTER_ADDR"] == "127.0.0.1"
        assert line.environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        assert line.environment["OMP_NUM_THREADS"] == str(max(1, cores // 3))
    assert len({line.environment["MASTER_PORT"] for line in lines.values()}) == 1
    assert json.loads((fakes.out / "settings.json").read_text()) == Settings().model_dump(mode="json")
    assert not (fakes.out / "run.json").exists()  # rank 0's to write


def test_an_exception_in_one_rank_ends_all_and_is_named_with_its_log(fakes):
    fakes.behave(rank_2="raise", other="wait")
    with pytest.raises(LasgdError, match=r"rank 2 of 4 failed .* ValueError: boom\nSee .*rank-2\.log$") as caught:
        fakes.launch(4)
    for line in fakes.lines(4).values():
        assert "interrupted" not in line.rest()
    assert "boom" in (fakes.out / "logs" / "rank-2.log").read_text()
    run = read_run(fakes.out)
    assert run.status == "failed"
    assert run.error == str(caught.value).splitlines()[0]


def test_an_error_of_our_own_keeps_its_class_and_its_words(fakes):
    fakes.behave(rank_1="raise ours", other="wait")
    with pytest.raises(DataError, match=r"^rank 1 of 2: a folder is missing\.\nSee "):
        fakes.launch(2)


def test_a_killed_rank_ends_all_and_its_signal_is_named(fakes):
    fakes.behave(rank_1="killed", other="wait")
    with pytest.raises(LasgdError, match="rank 1 of 2 was killed by SIGKILL"):
        fakes.launch(2)
    for line in fakes.lines(2).values():
        line.rest()
    assert read_run(fakes.out).status == "failed"


def test_an_exit_code_without_a_reason_points_to_the_log(fakes):
    fakes.behave(rank_1="code", other="wait")
    with pytest.raises(LasgdError, match=r"(?s)rank 1 of 2 exited with code 3 .*rank-1\.log"):
        fakes.launch(2)
    assert "some last words" in (fakes.out / "logs" / "rank-1.log").read_text()


def make_cut(out: Path, world_size: int) -> None:
    cut = out / "checkpoints" / "000001"
    cut.mkdir(parents=True)
    for rank in range(world_size):
        (cut / f"rank-{rank}.pt").touch()


def test_a_failed_run_with_a_checkpoint_says_how_to_go_on(fakes):
    make_cut(fakes.out, 2)
    fakes.behave(rank_1="raise", other="wait")
    with pytest.raises(LasgdError, match=r"go on with: lasgd train --resume .*out$"):
        fakes.launch(2)


def test_a_checkpoint_that_cannot_be_resumed_is_not_what_to_go_on_with(fakes):
    make_cut(fakes.out, 2)
    fakes.behave(rank_1="refuse", other="wait")
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        launch(Settings(), fakes.out, fakes.out, 2, command=FAKE)
    assert "go on with" not in str(caught.value)


def test_the_workers_of_a_killed_rank_are_killed_too(fakes):
    fakes.behave(rank_1="killed with worker", other="wait")
    with pytest.raises(LasgdError, match="rank 1"):
        fakes.launch(2)
    lines = fakes.lines(3)
    assert lines["worker"].rest() == []


def test_the_culprit_is_named_and_not_the_rank_that_only_blamed_a_peer_first(fakes):
    fakes.behave(rank_0="blame", rank_1="raise after the blame", other="wait")
    with pytest.raises(LasgdError, match=r"rank 1 of 3 failed .* ValueError: boom"):
        fakes.launch(3)


def test_where_all_only_blame_a_peer_the_blame_is_the_error(fakes):
    fakes.behave(rank_1="blame", other="wait")
    with pytest.raises(PeerError, match="rank 1 of 2: somebody is silent"):
        fakes.launch(2)


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period(fakes):
    fakes.behave(rank_0="deaf", other="wait")
    with fakes.parent(2, grace_s=0.5) as parent:
        lines = fakes.lines(2)
        assert lines["0"].next() == "ready"
        os.kill(lines["1"].pid, signal.SIGKILL)
        assert lines["0"].rest() == ["terminated"]
        _, error = parent.communicate(timeout=30)
    assert parent.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL" in error


def test_ctrl_c_reaches_every_rank_exactly_once_and_waits_for_the_clean_end(fakes):
    fakes.behave(other="wait")
    with fakes.parent(3) as parent:
        lines = fakes.lines(3)
        assert [line.next() for line in lines.values()] == ["ready"] * 3
        parent.send_signal(signal.SIGINT)
        assert [line.rest() for line in lines.values()] == [["interrupted"]] * 3
        assert parent.wait(30) == 130
    assert read_run(fakes.out).status == "interrupted"


def test_ranks_are_groups_of_their_own_in_the_parents_session(fakes):
    fakes.behave(other="wait")
    with fakes.parent(2) as parent:
        for line in fakes.lines(2).values():
            assert line.next() == "ready"
            assert os.getsid(line.pid) == parent.pid, "a session of its own is another share of the cores"
            assert os.getpgid(line.pid) == line.pid


def test_sigterm_to_the_parent_is_a_ctrl_c(fakes):
    fakes.behave(other="wait")
    with fakes.parent(2) as parent:
        lines = fakes.lines(2)
        assert [line.next() for line in lines.values()] == ["ready"] * 2
        parent.terminate()
        assert [line.rest() for line in lines.values()] == [["interrupted"]] * 2
        assert parent.wait(30) == 130


def test_a_second_ctrl_c_kills_at_once(fakes):
    fakes.behave(other="deaf")
    with fakes.parent(2, grace_s=1000.0) as parent:
        lines = fakes.lines(2)
        assert [line.next() for line in lines.values()] == ["ready"] * 2
        parent.send_signal(signal.SIGINT)
        assert [line.next() for line in lines.values()] == ["interrupted"] * 2
        parent.send_signal(signal.SIGINT)
        assert [line.rest() for line in lines.values()] == [[], []]
        assert parent.wait(30) == 130
    assert read_run(fakes.out).status == "interrupted"


def test_ctrl_c_before_a_rank_trains_ends_all_without_a_traceback(fakes):
    fakes.behave(rank_0="not yet training", other="deaf")
    with fakes.parent(2, grace_s=0.5) as parent:
        lines = fakes.lines(2)
        assert [line.next() for line in lines.values()] == ["ready"] * 2
        parent.send_signal(signal.SIGINT)
        assert lines["0"].rest() == []
        assert lines["1"].rest() == ["interrupted", "terminated"]
        _, error = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert error == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_ranks_do_not_outlive_a_killed_parent(fakes):
    fakes.behave(other="deaf")
    with fakes.parent(3) as parent:
        lines = fakes.lines(3)
        assert [line.next() for line in lines.values()] == ["ready"] * 3
        parent.kill()
        assert [line.rest() for line in lines.values()] == [[], [], []]


def test_a_failure_leaves_what_rank_0_wrote_in_run_json_and_adds_the_cause(fakes, monkeypatch):
    fakes.behave(rank_1="raise", other="end")
    written = {"status": "failed", "error": "rank 0: somebody is silent", "algorithm": "lasgd", "condition": "fast"}
    written |= {"settings": {}, "environment": {}, "world_size": 2, "samples": 77}

    import lasgd.lab.launch as module

    def wait_ended(supervisor, timeout_s=None):
        outcome = original(supervisor, timeout_s)
        (fakes.out / "run.json").write_text(json.dumps(written))
        return outcome

    original = module.Supervisor.wait_ended
    monkeypatch.setattr(module.Supervisor, "wait_ended", wait_ended)
    with pytest.raises(LasgdError, match="boom"):
        fakes.launch(2)
    run = read_run(fakes.out)
    assert run.samples == 77
    assert "ValueError: boom" in (run.error or "")


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_a_resumption_that_fails_takes_nothing_away_from_what_was_reached(fakes, status):
    fakes.behave(rank_1="raise", other="wait")
    fakes.out.mkdir()
    earlier = {"status": status, "algorithm": "lasgd", "condition": "fast", "settings": {}, "environment": {}}
    earlier |= {"world_size": 2, "samples": 77, "final": {"top1": 0.9, "top5": 1.0, "loss": 0.3}}
    (fakes.out / "run.json").write_text(json.dumps(earlier))
    before = read_run(fakes.out)
    with pytest.raises(LasgdError):
        fakes.launch(2)
    run = read_run(fakes.out)
    assert (run.samples, run.final) == (77, before.final)
    if status == "finished":
        assert run == before
    else:
        assert run.status == "failed"
        assert "ValueError: boom" in (run.error or "")


def fake_network(why_not: str | None) -> types.ModuleType:
    module = types.ModuleType("lasgd.lab.network")

    class ShapedNetwork:
        host_address = "127.0.0.1"

        def __init__(self, world_size, bandwidth_bytes_per_s, latency_s):
            self.bandwidth_bytes_per_s = bandwidth_bytes_per_s

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def command_prefix(self, rank):
            return ["env", f"NAMESPACE={rank}"]

        def environment(self, rank):
            return {"GLOO_SOCKET_IFNAME": f"veth{rank}", "RATE": str(self.bandwidth_bytes_per_s)}

    module.why_not_namespaces = lambda latency_s, world_size: why_not
    module.ShapedNetwork = ShapedNetwork
    return module


def use_network(monkeypatch, why_not: str | None) -> None:
    import lasgd.lab

    module = fake_network(why_not)
    monkeypatch.setitem(sys.modules, "lasgd.lab.network", module)
    monkeypatch.setattr(lasgd.lab, "network", module, raising=False)


def test_a_shaped_link_puts_each_rank_into_its_namespace(fakes, monkeypatch):
    use_network(monkeypatch, None)
    fakes.behave(other="end")
    assert launch(Settings(condition="link=20mbit"), fakes.out, fakes.out / "a", 2, command=FAKE) == 0
    for rank, line in fakes.lines(2).items():
        assert line.environment["NAMESPACE"] == rank
        assert line.environment["GLOO_SOCKET_IFNAME"] == f"veth{rank}"
        assert float(line.environment["RATE"]) == 2.5e6
        assert line.argv == [str(fakes.out), "--resume", str(fakes.out / "a"), "--link-emulation", "namespaces"]


def test_without_namespaces_the_reason_is_said_once_and_the_ranks_throttle_themselves(fakes, monkeypatch, capfd):
    use_network(monkeypatch, "not root")
    fakes.behave(other="end")
    assert launch(Settings(condition="link=20mbit"), fakes.out, None, 2, command=FAKE) == 0
    assert [line.argv[-1] for line in fakes.lines(2).values()] == ["user space"] * 2
    assert capfd.readouterr().err.count("not root") == 1


RENDEZVOUS = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1) * (1 + dist.get_rank())
dist.all_reduce(x)
assert x.item() == 3, x
port = f"{int(os.environ['MASTER_PORT']):04X}"
if os.environ["MASTER_ADDR"] == "127.0.0.1" and os.path.exists("/proc/net/tcp6"):
    rows = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/net/{name}").readlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(":" + port)]
    assert listening == ["0100007F:" + port], listening
dist.destroy_process_group()
"""


@pytest.fixture
def rendezvous(tmp_path, monkeypatch):
    (tmp_path / "rendezvous_rank.py").write_text(RENDEZVOUS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    command = ("-m", "lasgd.lab.rank_process", "rendezvous_rank")
    return lambda settings: launch(settings, tmp_path / "out", None, 2, command=command)


def test_ranks_find_each_other_at_a_store_that_only_this_machine_reaches(rendezvous):
    assert rendezvous(Settings()) == 0


@pytest.mark.root
def test_ranks_find_each_other_across_shaped_links(rendezvous):
    why_not = network.why_not_namespaces()
    if why_not is not None:
        pytest.skip(why_not)
    assert rendezvous(Settings(condition="link=20mbit")) == 0
