"""Links of a given speed between the ranks of one machine: a network namespace for each rank. Linux, as root.

    parent's namespace       hub                                     rank 0
    lasgd<pid>n0 ───────── host ─┬─ bridge0                          link0
    host_address                 ├─ r0  tbf: rank 0's download ───── tbf: rank 0's upload
                                 ├─ r1  ...

Each rank's link is shaped in both directions by the kernel's token bucket filter. The bridge lives in a namespace of
its own, so that neither the machine's firewall rules nor its forwarding touch what the ranks send each other, and none
is changed. Names say who made them, `lasgd-<pid>-<start time>-<number>-<role>`; what killed runs left behind is removed
when the next network is made.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Interface, IPv4Network, ip_network
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from lasgd.errors import ConfigurationError
from lasgd.lab.frames import frame_bytes, mtu_bytes

MAX_RANKS = 64
"""Ranks for which one network is made at most."""

_DEVICE = "link0"  # the rank's end of its link, by the same name in every namespace
_COMMAND_TIMEOUT_S = 10.0
_LOCK = Path("/run/lasgd-network.lock")  # an empty file that stays: removing a lock file races with who opens it
_NAME = re.compile(r"lasgd-(?P<pid>\d+)-(?P<start>\d+)-(?P<number>\d+)-\w+")
# 198.18/15 is set aside for benchmarks (RFC 2544) and hardly ever in use; private addresses where it is.
_BLOCKS = (IPv4Network("198.18.0.0/15"), IPv4Network("10.192.0.0/15"))
_probes = itertools.count()


def why_not_namespaces(latency_s: float = 0.0, world_size: int = 1) -> str | None:
    """Why such links cannot be made by network namespaces here, in words for the user; None where they can.

    Tries it out in a namespace that is gone afterwards; some 50 ms.
    """
    if sys.platform != "linux":
        return f"network namespaces exist on Linux only, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if world_size > MAX_RANKS:
        return f"network namespaces are made for {MAX_RANKS} ranks at most"
    try:
        for tool in ("ip", "tc"):
            _path_of(tool)
        probe = _Names(number=0).namespace(f"probe{next(_probes)}")
        with _locked():
            remove_leftovers()
        try:
            _run("ip", "netns", "add", probe)
            _run("ip", "-n", probe, "link", "add", "name", "bridge0", "type", "bridge")
            _run("ip", "-n", probe, "link", "add", "name", "port0", "type", "veth", "peer", "name", _DEVICE)
            _shape(probe, _DEVICE, 2.5e6)
            if latency_s:
                try:
                    _shape(probe, "port0", 2.5e6, latency_s)
                except ConfigurationError as error:
                    return f"latency needs the kernel's netem, which is not to be had: {error}"
        finally:
            _remove_namespaces([probe])
    except (ConfigurationError, OSError) as error:
        return str(error)
    return None


class ShapedNetwork:
    """One link for each rank, `bandwidth_bytes_per_s` each way; made on `with`, all of it removed at its end.

        with ShapedNetwork(4, 2.5e6) as network:
            Popen([*network.command_prefix(rank), ...], env={**os.environ, **network.environment(rank)})

    Ranks reach each other at `rank_address` and the parent at `host_address`, where its store must listen, and nothing
    else: no name server, no downloads. The parent's own link is not shaped. Several networks may exist beside each
    other, in one process or in many.
    """

    host_address: str
    """The parent's IPv4 address on this network; known inside `with`."""

    def __init__(self, world_size: int, bandwidth_bytes_per_s: float, latency_s: float = 0.0) -> None:
        """`latency_s` is one way, from rank to rank, and needs the kernel's netem.

        Raises ConfigurationError if `world_size` is not 1 to 64 or the link is not positive.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ConfigurationError(f"{world_size} ranks on emulated links; expected 1 to {MAX_RANKS}.")
        if not bandwidth_bytes_per_s > 0 or latency_s < 0:
            raise ConfigurationError(
                f"an emulated link of {bandwidth_bytes_per_s} bytes/s and {latency_s} s latency; expected a positive "
                f"bandwidth and a latency of at least 0."
            )
        self.world_size = world_size
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self._names: _Names | None = None
        self._subnet = _BLOCKS[0]

    def __enter__(self) -> ShapedNetwork:
        """Makes the network. Raises ConfigurationError, with nothing left behind, if the machine does not allow it."""
        if self._names is not None:
            raise ConfigurationError("this emulated network is in use already; make one ShapedNetwork for each run.")
        try:
            with _locked():
                remove_leftovers()
                self._names = _Names(_free_number())
                self._subnet = _free_subnet()
                self._make(self._names)
            self._check_reachable()
        except BaseException:
            with contextlib.suppress(ConfigurationError):  # what made it fail is the better message
                self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the network; processes that still run in it lose their links."""
        try:
            self.close()
        except ConfigurationError as not_removed:
            if error is None:
                raise
            error.add_note(f"Besides, {not_removed}")

    def close(self) -> None:
        """Removes whatever there is of the network; may be called twice. Raises ConfigurationError if some remains."""
        if self._names is None:
            return
        names, self._names = self._names, None
        _remove(names)

    def command_prefix(self, rank: int) -> list[str]:
        """What to put before a rank's command; the process that is started so becomes the command, with its pid."""
        return [_path_of("ip"), "netns", "exec", self._in_use().namespace(f"r{self._checked(rank)}")]

    def environment(self, rank: int) -> dict[str, str]:
        """Variables by which the rank's collectives find its link."""
        self._checked(rank)
        # No name server can be reached from a rank, and torch warns of that whenever a rank opens its store.
        quiet = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
        return {"GLOO_SOCKET_IFNAME": _DEVICE, "NCCL_SOCKET_IFNAME": _DEVICE, "TORCH_CPP_LOG_LEVEL": quiet}

    def rank_address(self, rank: int) -> str:
        """The rank's IPv4 address on this network."""
        return str(self._subnet[2 + self._checked(rank)])

    def _in_use(self) -> _Names:
        if self._names is None:
            raise ConfigurationError("this emulated network does not exist; use ShapedNetwork in a `with` statement.")
        return self._names

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ConfigurationError(f"there is no rank {rank} among {self.world_size} ranks.")
        return rank

    def _make(self, names: _Names) -> None:
        hub, bits = names.namespace("hub"), self._subnet.prefixlen
        mtu = str(mtu_bytes(self.bandwidth_bytes_per_s))
        self.host_address = str(self._subnet[1])
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "set", "lo", "up")
        _run("ip", "-n", hub, "link", "add", "name", "bridge0", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge0", "up")
        _run("ip", "link", "add", "name", names.device, "type", "veth", "peer", "name", "host", "netns", hub)
        _run("ip", "-n", hub, "link", "set", "host", "master", "bridge0", "up")
        _run("ip", "addr", "add", f"{self.host_address}/{bits}", "dev", names.device)
        _run("ip", "link", "set", names.device, "up")
        for rank in range(self.world_size):
            namespace, port = names.namespace(f"r{rank}"), f"r{rank}"
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _fill_links(namespace)
            _run(
                "ip",
                "-n",
                hub,
                "link",
                "add",
                "name",
                port,
                "type",
                "veth",
                "peer",
                "name",
                _DEVICE,
                "netns",
                namespace,
            )
            _run("ip", "-n", hub, "link", "set", port, "mtu", mtu, "master", "bridge0", "up")
            _run("ip", "-n", namespace, "addr", "add", f"{self.rank_address(rank)}/{bits}", "dev", _DEVICE)
            _run("ip", "-n", namespace, "link", "set", _DEVICE, "mtu", mtu, "up")
            _shape(hub, port, self.bandwidth_bytes_per_s)
            _shape(namespace, _DEVICE, self.bandwidth_bytes_per_s, self.latency_s)  # on one end: it counts once a way

    def _check_reachable(self) -> None:
        """Raises ConfigurationError if rank 0 cannot connect to the parent, rather than let ranks hang at the start."""
        connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
        with socket.create_server((self.host_address, 0)) as server:
            port = server.getsockname()[1]
            try:
                _run(*self.command_prefix(0), sys.executable, "-I", "-S", "-c", connect, self.host_address, str(port))
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"ranks in network namespaces cannot connect to {self.host_address} on this machine. Does a "
                    f"firewall drop what comes in on lasgd*? Let it pass, or run without root: links are then "
                    f"emulated in user space."
                ) from error


def remove_leftovers() -> None:
    """Removes the networks of runs that are dead. Raises ConfigurationError if one cannot be removed."""
    dead = {
        (int(found["pid"]), int(found["start"]), int(found["number"]))
        for found in map(_NAME.fullmatch, _namespaces())
        if found and _start_time(int(found["pid"])) != int(found["start"])
    }
    for pid, start, number in sorted(dead):
        _remove(_Names(number, pid, start))


class _Names:
    """What the things of one network are called: unique to a process, even after its pid has been used again."""

    def __init__(self, number: int, pid: int | None = None, start: int | None = None) -> None:
        pid = os.getpid() if pid is None else pid
        start = _start_time(pid) if start is None else start
        self.prefix = f"lasgd-{pid}-{start}-{number}-"
        self.device = f"lasgd{pid}n{number}"  # pid < 2**22 and number < 100 stay within the kernel's 15 characters

    def namespace(self, role: str) -> str:
        return self.prefix + role


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is dead or a zombie."""
    try:
        # pid (name) state ... start time is field 22; the name may hold anything, brackets too
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _devices() -> set[str]:
    return {device["ifname"] for device in json.loads(_run("ip", "-j", "link", "show") or "[]") if device}


def _remove(names: _Names) -> None:
    """Removes a network's parts that exist. Whatever fails, the others are tried."""
    failed: list[ConfigurationError] = []
    # The parent's device would go with the hub, but some time after; deleting it takes effect at once.
    if names.device in _devices():
        try:
            _run("ip", "link", "del", names.device)
        except ConfigurationError as error:
            failed.append(error)
    _remove_namespaces(name for name in _namespaces() if name.startswith(names.prefix))
    if failed and names.device in _devices():
        raise failed[0]


def _remove_namespaces(names: Iterable[str]) -> None:
    """Removes those that exist, and with them the devices in them. Raises the first error if some remain."""
    failed: list[ConfigurationError] = []
    names = set(names)
    for name in sorted(names & set(_namespaces())):
        try:
            _run("ip", "netns", "del", name)
        except ConfigurationError as error:
            failed.append(error)
    if failed and names & set(_namespaces()):
        raise failed[0]


def _free_number() -> int:
    """A number under which this process has neither namespaces nor a device."""
    devices, namespaces = _devices(), _namespaces()
    for number in range(100):
        names = _Names(number)
        if names.device not in devices and not any(name.startswith(names.prefix) for name in namespaces):
            return number
    raise ConfigurationError("this process has 100 emulated networks already; close some of them.")


def _free_subnet() -> IPv4Network:
    """A subnet that no device and no route of this machine uses."""
    used = [
        IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
        for device in json.loads(_run("ip", "-j", "-4", "addr", "show") or "[]")
        for address in device.get("addr_info", [])
    ]
    for route in json.loads(_run("ip", "-j", "-4", "route", "show", "table", "all") or "[]"):
        with contextlib.suppress(ValueError):  # `default` is not in the way
            network = ip_network(route.get("dst", ""), strict=False)
            if isinstance(network, IPv4Network) and network.prefixlen >= 8:  # nor is a tunnel that takes half of all
                used.append(network)
    for block in _BLOCKS:
        subnets = list(block.subnets(new_prefix=24))
        first = os.getpid() % len(subnets)  # processes that do not see each other's devices rarely choose the same
        for subnet in subnets[first:] + subnets[:first]:
            if not any(subnet.overlaps(network) for network in used):
                return subnet
    raise ConfigurationError(f"no free subnet for emulated links in {' and '.join(map(str, _BLOCKS))}.")


def _shape(namespace: str, device: str, bandwidth_bytes_per_s: float, latency_s: float = 0.0) -> None:
    burst, limit = _bucket_bytes(bandwidth_bytes_per_s)
    rate = f"{round(bandwidth_bytes_per_s * 8)}bit"
    on = ("tc", "-n", namespace, "qdisc", "add", "dev", device)
    _run(*on, "root", "handle", "1:", "tbf", "rate", rate, "burst", f"{burst}b", "limit", f"{limit}b")
    if latency_s:
        packets = 1000 + round((limit + bandwidth_bytes_per_s * latency_s) / 1000)  # no loss within the delay
        delay = f"{max(1, round(latency_s * 1e6))}us"
        _run(*on, "parent", "1:1", "handle", "10:", "netem", "delay", delay, "limit", str(packets))


def _fill_links(namespace: str) -> None:
    """Lets TCP find its rate by filling the link's queue, where the system allows to choose.

    BBR, the default of some systems, paces by what it has measured, and in a ring, where every link waits for another,
    that is less than the link could carry: all-reduces took longer with it, and each another time.
    """
    with contextlib.suppress(ConfigurationError):
        choose = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
        _run("ip", "netns", "exec", namespace, "sh", "-c", choose)


def _bucket_bytes(bandwidth_bytes_per_s: float) -> tuple[int, int]:
    """Burst and queue limit of the token bucket: 25 kB and 200 ms of waiting at 20 mbit/s.

    The burst passes at once after a pause, so it is to be small beside what is sent, also beside a fragment of 150 kB,
    and beside the pauses between rounds, in which it fills again: at most 128 KiB and 10 ms. But it
    must hold two full frames, or nothing passes, and 1 ms, or the kernel wakes up too rarely to reach the rate.
    The queue takes 200 ms, and 64 KiB at least, for TCP sends that much at once.
    """
    two_frames = 2 * frame_bytes(bandwidth_bytes_per_s)
    ten_ms, one_ms = 1e-2 * bandwidth_bytes_per_s, 1e-3 * bandwidth_bytes_per_s
    burst = round(max(two_frames, min(128 * 1024, ten_ms), one_ms))
    return burst, burst + round(max(64 * 1024, 0.2 * bandwidth_bytes_per_s))


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Only one process at a time looks for free names and subnets and takes them."""
    import fcntl

    with _LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held elsewhere for as long as its commands' time-outs allow, no longer
        yield


def _path_of(tool: str) -> str:
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise ConfigurationError(f"the command `{tool}` is not installed (on Debian: package iproute2)")
    return path


def _run(*command: str) -> str:
    """Runs `ip` or `tc` and returns its output. Raises ConfigurationError with the command and what it said."""
    path = command[0] if "/" in command[0] else _path_of(command[0])
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        _refuse(command, f"did not end within {_COMMAND_TIMEOUT_S:g} s", error)
    except OSError as error:
        _refuse(command, f"could not be started: {error}", error)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        _refuse(command, f"failed (exit {done.returncode}): {said or 'no message'}", None)
    return done.stdout


def _refuse(command: tuple[str, ...], why: str, cause: BaseException | None) -> NoReturn:
    raise ConfigurationError(f"emulated network: `{shlex.join(command)}` {why}") from cause
