"""The language of --network."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError
from lasgd.lab.network_text import parse_network
from lasgd.virtual.network_models import Network, Nodes


@pytest.mark.parametrize(
    "text, network",
    [
        ("fast", Network(8, math.inf)),
        ("20mbit", Network(8, 2.5e6)),
        (" 100MBit , latency = 20ms ", Network(8, 1.25e7, latency_s=0.02)),
        ("up=10mbit,down=100mbit", Network(8, 1.25e6, 1.25e7)),
        ("latency=1ms,down=100mbit,up=10mbit", Network(8, 1.25e6, 1.25e7, latency_s=0.001)),
        ("20mbit,backbone=1gbit", Network(8, 2.5e6, backbone_bytes_per_s=1.25e8)),
        (
            "nodes=2x4,inside=10gbit,between=1gbit,latency=50us",
            Network(8, 1.25e9, latency_s=50e-6, nodes=Nodes(4, 1.25e8)),
        ),
        (
            "nodes=4x2,inside=10gbit,between=1gbit,inside-latency=5us,backbone=2gbit",
            Network(8, 1.25e9, nodes=Nodes(2, 1.25e8, inside_latency_s=5e-6), backbone_bytes_per_s=2.5e8),
        ),
        ("20mbit+rank=last:1mbit", Network(8, [2.5e6] * 7 + [1.25e5], latency_s=[0.0] * 8)),
        (
            "20mbit,latency=1ms+rank=0:up=1mbit,down=8mbit,latency=9ms",
            Network(8, [1.25e5] + [2.5e6] * 7, [1e6] + [2.5e6] * 7, latency_s=[0.009] + [0.001] * 7),
        ),
        ("fast+rank=0:1mbit", Network(8, [1.25e5] + [math.inf] * 7, latency_s=[0.0] * 8)),
    ],
)
def test_text_becomes_a_network(text, network):
    assert parse_network(text, 8) == network


@pytest.mark.parametrize(
    "text, shown",
    [
        ("", "'' is no option. Expected 20mbit or 100mbit,latency=20ms or up=10mbit,down=100mbit"),
        ("20", "network part '20': '20' is not a bandwidth (a positive decimal number and gbit or mbit or kbit)"),
        ("20mbit,20mbit", "'20mbit' is no option"),
        ("5000gbit", "Expected 1kbit to 1000gbit"),
        ("0mbit", "'0mbit' would isolate every rank"),
        ("latency=20ms", "that would isolate every rank"),
        ("up=10mbit", "no `down=`: that would isolate every rank"),
        ("up=10mbit,down=0mbit", "'0mbit' would isolate every rank"),
        ("20mbit,up=10mbit", "`up=` beside '20mbit'"),
        ("20mbit,latncy=20ms", "Did you mean 'latency'?"),
        ("20mbit,latency=20ms,latency=20ms", "`latency=` is given twice"),
        ("20mbit,latency=20", "'20' is not a duration"),
        ("20mbit,inside=1gbit", "`inside=` is said of nodes. Expected nodes=8x4,inside=10gbit"),
        ("nodes=2x4", "nodes need `inside=`. Expected nodes=8x4,inside=10gbit,between=1gbit,latency=50us"),
        ("nodes=2x4,inside=10gbit", "nodes need `between=`"),
        ("nodes=8,inside=10gbit,between=1gbit", "'8' is not a number of nodes and of ranks in each"),
        ("nodes=8x4,inside=10gbit,between=1gbit", "8 nodes of 4 are 32 ranks, and the run has 8"),
        ("nodes=2x4,inside=10gbit,between=0gbit", "'0gbit' would isolate every rank"),
        ("nodes=2x4,up=1mbit,inside=10gbit,between=1gbit", "`up=` beside nodes: a rank's own link is `inside=`"),
        ("20mbit,nodes=2x4,inside=10gbit,between=1gbit", "'20mbit' beside nodes"),
        ("20mbit+", "after `+` comes the link of a single rank. Expected rank=3:1mbit or"),
        ("20mbit+latency=20ms", "after `+` comes the link of a single rank"),
        ("20mbit+rnk=3:1mbit", "Did you mean 'rank'?"),
        ("20mbit+rank=3", "'3' is not a rank and its link"),
        ("20mbit+rank=first:1mbit", "'first' is not a rank"),
        ("20mbit+rank=8:1mbit", "there is no rank 8 among 8 ranks. Expected 0 to 7, or `last`"),
        ("20mbit+rank=3:0mbit", "network part 'rank=3:0mbit': '0mbit' would isolate rank 3"),
        ("20mbit+rank=3:latency=20ms", "no bandwidth is given, or no `up=`: that would isolate rank 3"),
        ("20mbit+rank=3:1mbit,backbone=1gbit", "option 'backbone' is not known. Known: down, latency, up."),
        ("20mbit+rank=7:1mbit+rank=last:1mbit", "rank 7 is given twice"),
    ],
)
def test_bad_text_is_refused_with_the_part_and_what_was_expected(text, shown):
    with pytest.raises(ConfigurationError) as refused:
        parse_network(text, 8)
    assert shown in str(refused.value)


@given(st.text(alphabet="nodesinbtwgukraplcy=:+,.0123456789x -", max_size=40))
def test_no_text_raises_anything_but_a_configuration_error(text):
    try:
        assert parse_network(text, 8).all_reduce_s(1000, range(8)) >= 0
    except ConfigurationError:
        return
