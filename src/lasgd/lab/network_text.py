"""The small language of --network: the links between the ranks of a simulated run.

fast                                               links that cost nothing
20mbit                                             every rank's link, each way; kbit, mbit or gbit
100mbit,latency=20ms                               the same, and a message takes 20 ms on its way
up=10mbit,down=100mbit                             the two directions apart; latency= may follow
nodes=8x4,inside=10gbit,between=1gbit,latency=50us 8 nodes of 4 ranks each: every rank's link has 10 Gbit/s, and
                                                   the 4 share their node's link of 1 Gbit/s to other nodes;
                                                   latency= is said of messages between nodes, inside-latency= of
                                                   others
...,backbone=10gbit                                what all messages together have at most (between nodes)
...+rank=3:1mbit+rank=last:up=1mbit,down=8mbit     single ranks whose own link is another one; latency= may follow
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lasgd.errors import unknown
from lasgd.lab.quantities import BITS, Reader
from lasgd.virtual.network_models import Network, Nodes

_READ = Reader("network")
_EXAMPLE = "20mbit or 100mbit,latency=20ms or up=10mbit,down=100mbit"
_NODES_EXAMPLE = "nodes=8x4,inside=10gbit,between=1gbit,latency=50us"
_RANK_EXAMPLE = "rank=3:1mbit or rank=last:up=1mbit,down=8mbit"
_OF_A_LINK = ("up", "down", "latency")
_OF_NODES = ("inside", "between", "inside-latency")
_OPTIONS = (*_OF_A_LINK, *_OF_NODES, "nodes", "backbone")


@dataclass(frozen=True)
class _Link:
    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float | None


def parse_network(text: str, world_size: int) -> Network:
    """The network that `text` describes, of `world_size` ranks; upper and lower case are alike.

    Raises ConfigurationError that shows the part that cannot be understood and what was expected in its place; also for
    nodes that do not hold `world_size` ranks, and for a rank that is not among them, or cut off.
    """
    first, *others = (part.strip() for part in text.casefold().split("+"))
    if first == "fast":
        link, nodes, backbone = _Link(math.inf, math.inf, None), None, math.inf
    else:
        link, nodes, backbone = _common(first, world_size)
    ranks: dict[int, _Link] = {}
    for part in others:
        rank, own = _rank(text, part, world_size)
        if rank in ranks:
            _READ.refuse(part, f"rank {rank} is given twice in {text!r}", "one link for each rank")
        ranks[rank] = own
    latency_s = link.latency_s or 0.0
    if not ranks:
        return Network(
            world_size, link.up_bytes_per_s, link.down_bytes_per_s, latency_s, nodes, backbone_bytes_per_s=backbone
        )
    links = [ranks.get(rank, link) for rank in range(world_size)]
    return Network(
        world_size,
        [each.up_bytes_per_s for each in links],
        [each.down_bytes_per_s for each in links],
        [latency_s if each.latency_s is None else each.latency_s for each in links],
        nodes,
        backbone_bytes_per_s=backbone,
    )


def _common(part: str, world_size: int) -> tuple[_Link, Nodes | None, float]:
    """What the first part says of all ranks."""
    options = _options(part, part, _OPTIONS, _EXAMPLE)
    backbone = _bandwidth(part, options["backbone"], "every rank") if "backbone" in options else math.inf
    if "nodes" not in options:
        for name in _OF_NODES:
            if name in options:
                _READ.refuse(part, f"`{name}=` is said of nodes", _NODES_EXAMPLE)
        return _link(part, options, "every rank", _EXAMPLE), None, backbone
    for name in ("", "up", "down"):
        if name in options:
            given = f"`{name}=`" if name else repr(options[""])
            _READ.refuse(part, f"{given} beside nodes: a rank's own link is `inside=`", _NODES_EXAMPLE)
    for name in ("inside", "between"):
        if name not in options:
            _READ.refuse(part, f"nodes need `{name}=`", _NODES_EXAMPLE)
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", options["nodes"], re.ASCII)
    if found is None:
        _READ.refuse(part, f"{options['nodes']!r} is not a number of nodes and of ranks in each", _NODES_EXAMPLE)
    n_nodes, size = int(found[1]), int(found[2])
    if n_nodes * size != world_size:
        _READ.refuse(
            part, f"{n_nodes} nodes of {size} are {n_nodes * size} ranks, and the run has {world_size}", _NODES_EXAMPLE
        )
    inside = _bandwidth(part, options["inside"], "every rank")
    latency_s, inside_latency_s = (
        _READ.duration_s(part, options[name], _NODES_EXAMPLE) if name in options else 0.0
        for name in ("latency", "inside-latency")
    )
    between = _bandwidth(part, options["between"], "every rank")
    return _Link(inside, inside, latency_s), Nodes(size, between, between, inside_latency_s), backbone


def _rank(text: str, part: str, world_size: int) -> tuple[int, _Link]:
    """`rank=3:1mbit` -> 3, its own link."""
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if name != "rank":
        if not part or name in ("", "fast", *_OPTIONS) or not equals:
            _READ.refuse(part or text, "after `+` comes the link of a single rank", _RANK_EXAMPLE)
        raise unknown(f"network {text!r}: part", name, ["rank"])
    who, colon, link = (piece.strip() for piece in value.partition(":"))
    if not colon:
        _READ.refuse(part, f"{value!r} is not a rank and its link", _RANK_EXAMPLE)
    if who != "last" and not re.fullmatch(r"\d{1,9}", who, re.ASCII):
        _READ.refuse(part, f"{who!r} is not a rank", _RANK_EXAMPLE)
    rank = world_size - 1 if who == "last" else int(who)
    if rank >= world_size:
        _READ.refuse(part, f"there is no rank {rank} among {world_size} ranks", f"0 to {world_size - 1}, or `last`")
    return rank, _link(part, _options(part, link, _OF_A_LINK, _RANK_EXAMPLE), f"rank {rank}", _RANK_EXAMPLE)


def _options(part: str, text: str, known: tuple[str, ...], example: str) -> dict[str, str]:
    """`100mbit,latency=20ms` -> {"": 100mbit, latency: 20ms}; only the first may come without a name."""
    options: dict[str, str] = {}
    for place, piece in enumerate(text.split(",")):
        name, equals, value = (word.strip() for word in piece.partition("="))
        if not equals:
            if place or not name:
                _READ.refuse(part, f"{piece.strip()!r} is no option", example)
            name, value = "", name
        elif name not in known:
            raise unknown(f"network part {part!r}: option", name, known)
        if name in options:
            _READ.refuse(part, f"`{name}=` is given twice", example)
        options[name] = value
    return options


def _link(part: str, options: dict[str, str], whose: str, example: str) -> _Link:
    if "" in options:
        for way in ("up", "down"):
            if way in options:
                _READ.refuse(part, f"`{way}=` beside {options['']!r}, which is said of both ways", example)
        up = down = _bandwidth(part, options[""], whose)
    else:
        for way in ("up", "down"):
            if way not in options:
                _READ.refuse(part, f"no bandwidth is given, or no `{way}=`: that would isolate {whose}", example)
        up, down = (_bandwidth(part, options[way], whose) for way in ("up", "down"))
    latency_s = _READ.duration_s(part, options["latency"], example) if "latency" in options else None
    return _Link(up, down, latency_s)


def _bandwidth(part: str, text: str, whose: str) -> float:
    if not _READ.quantity(part, text, "a bandwidth", BITS, _EXAMPLE):
        _READ.refuse(part, f"{text!r} would isolate {whose}", "1kbit to 1000gbit")
    return _READ.bandwidth_bytes_per_s(part, text, _EXAMPLE)
