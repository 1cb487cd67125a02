"""The same messages in SimGrid (its CM02 model: flows, max-min fair), where its Python module is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from lasgd.virtual import schedules
from lasgd.virtual.flows import Flows
from lasgd.virtual.network_models import Network

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        importlib.util.find_spec("simgrid") is None,
        reason="SimGrid's Python module is not installed (Debian: python3-simgrid)",
    ),
]

LATENCY_S = 0.002

# A process of its own: SimGrid allows one engine in each. CM02 without what it adds to max-min fairness by default:
# TCP's window, and acknowledgements that take a share of the way back.
SIMGRID = """
import json, sys
from simgrid import Actor, Engine, LinkInRoute, Mailbox, NetZone, this_actor

plan = json.loads(sys.argv[1])
engine = Engine(["simgrid", "--cfg=network/model:CM02", "--cfg=network/crosstraffic:0", "--cfg=network/TCP-gamma:1e18",
                 "--cfg=network/weight-S:0", "--log=root.thresh:critical"])
zone = NetZone.create_full_zone("ranks")
n = len(plan["up"])
hosts = [zone.create_host(f"rank{r}", 1e9) for r in range(n)]
ups = [zone.create_link(f"up{r}", plan["up"][r]).set_latency(plan["latency_s"]).seal() for r in range(n)]
downs = [zone.create_link(f"down{r}", plan["down"][r]).set_latency(0).seal() for r in range(n)]
for s in range(n):
    for t in range(n):
        if s != t:
            route = [LinkInRoute(ups[s]), LinkInRoute(downs[t])]
            zone.add_route(hosts[s].netpoint, hosts[t].netpoint, None, None, route, False)
zone.seal()
ends = {}

def sender(k, start_s, n_bytes):
    this_actor.sleep_until(start_s)
    Mailbox.by_name(str(k)).put("", int(n_bytes))

def receiver(k):
    Mailbox.by_name(str(k)).get()
    ends[k] = Engine.clock

for k, (start_s, source, target, n_bytes) in enumerate(plan["messages"]):
    Actor.create(f"s{k}", hosts[source], sender, k, start_s, n_bytes)
    Actor.create(f"r{k}", hosts[target], receiver, k)
engine.run()
print("ENDS", json.dumps([ends[k] for k in range(len(plan["messages"]))]))
"""


def simgrid_ends_s(up, down, messages) -> list[float]:
    plan = json.dumps({"up": up, "down": down, "latency_s": LATENCY_S, "messages": messages})
    done = subprocess.run([sys.executable, "-c", SIMGRID, plan], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ENDS ")]
    return json.loads(line.removeprefix("ENDS "))


def ends_s(up, down, messages) -> list[float]:
    flows = Flows(Network(len(up), up, down, latency_s=LATENCY_S))
    numbers = {flows.start(*messages[k]): k for k in sorted(range(len(messages)), key=lambda k: messages[k][0])}
    ends = [0.0] * len(messages)
    while (turn := flows.next_turn()) is not None:
        for at_s, flow in flows.advance(turn[0]):
            ends[numbers[flow]] = at_s
    return ends


UP, DOWN = [2.5e6, 2.5e6, 1.25e6, 5e6], [2.5e6, 5e6, 2.5e6, 1.25e6]

PLANS = {
    "one message": [(0.0, 0, 1, 1_570_000)],
    "both directions": [(0.0, 0, 1, 1_000_000), (0.0, 1, 0, 1_000_000)],
    "to a server": [(0.0, rank, 0, 1_570_000) for rank in (1, 2, 3)],
    "to and from a server": [(0.1 * k, *pair, 500_000) for k, pair in enumerate([(1, 0), (2, 0), (0, 3), (0, 1)])],
    "a step of the ring": [(0.0, *pair, 392_500) for pair in schedules.ring(range(4))[0].pairs],
    "everybody to everybody": [
        (0.05 * s, s, t, 100_000 * (1 + s + 2 * t)) for s in range(4) for t in range(4) if s != t
    ],
}


@pytest.mark.parametrize("messages", PLANS.values(), ids=PLANS)
def test_messages_arrive_when_simgrid_says(messages):
    # SimGrid works to a precision of 1e-5 in its shares and times.
    assert ends_s(UP, DOWN, messages) == pytest.approx(simgrid_ends_s(UP, DOWN, messages), rel=1e-4)
