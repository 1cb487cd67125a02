"""Trains with a peer of lasgd instead of lasgd: same data, model, schedule, conditions, and the same run folder.

    python benchmarks/peers/run.py torch_ddp --samples 4000 --ranks 2 --out runs/ddp
    python benchmarks/peers/run.py torchft_diloco --data cifar10.tar.xz --model cnn4 --batch-size 16 --lr 0.05 \\
        --samples 60000 --condition slow --sync-every 10 --out runs/diloco
    python benchmarks/peers/run.py hivemind_optimizer --help

Emulated links need network namespaces, so root: a peer's traffic cannot be slowed down in user space.

Peers count steps and no time, as what they wait for comes after equally many steps on all ranks. With `--seconds` a
short run tells this peer's pace first, and the run that counts is as long as fits, like its users would choose it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from pydantic import ValidationError  # noqa: E402

from lasgd.cli.train import check_data_and_model, explaining_surprises, prepared_folder  # noqa: E402
from lasgd.errors import ConfigurationError, LasgdError  # noqa: E402
from lasgd.lab import conditions, network  # noqa: E402
from lasgd.lab.launch import launch  # noqa: E402
from lasgd.training.interrupt import raising_interrupts  # noqa: E402
from lasgd.training.run_folder import read_run  # noqa: E402
from lasgd.training.settings import Settings  # noqa: E402
from peers import named  # noqa: E402

RANKS = 4
PACE_FOLDER = "pace"
PACE_STEPS = 40
PACE_SYNCHRONISATIONS = 3
SHARED = (
    *("data", "image_size", "workers", "model", "norm", "ranks", "samples", "epochs", "seconds", "batch_size", "lr"),
    *("momentum", "weight_decay", "warmup", "seed", "condition", "evaluations", "timeout_s", "start_timeout_s"),
)
"""The settings of `lasgd train` that a peer has too."""


def parser_for(options: type) -> argparse.ArgumentParser:
    """The command line of a peer with these options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/peers/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=tuple(named.PEERS), metavar="PEER", help=", ".join(named.PEERS))
    parser.add_argument("--out", type=Path, required=True, help="the run folder, new or empty")
    same = parser.add_argument_group("as `lasgd train` has them")
    for name in SHARED:
        same.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, dest=name)
    own = parser.add_argument_group("the peer's own")
    for option in fields(options):
        kind = type(option.default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        own.add_argument(f"--{option.name.replace('_', '-')}", default=option.default, dest=option.name, **how)
    return parser


def check_condition(settings: Settings, ranks: int) -> None:
    """Raises ConfigurationError where the condition cannot be made for a peer."""
    condition = conditions.parse(settings.condition)
    condition.check(ranks)
    if condition.round_s is not None:
        raise ConfigurationError(
            f"condition {settings.condition!r}: round= is made within lasgd's own group, which a peer does not use. "
            "Use link=, which slows down every program's traffic."
        )
    if condition.bandwidth_bytes_per_s is not None and ranks > 1:
        reason = network.why_not_namespaces(condition.latency_s, ranks)
        if reason is not None:
            raise ConfigurationError(
                f"condition {settings.condition!r}: a peer's traffic is slowed down by network namespaces only, "
                f"not in user space: {reason}. Leave link= out, or run this where it works (Linux, as root)."
            )


def run(argv: Sequence[str]) -> int:
    """Trains; returns the exit code. Raises LasgdError."""
    name = next((word for word in argv if not word.startswith("-")), None)
    peer = named.load(name) if name in named.PEERS else None
    arguments = vars(parser_for(peer.Options if peer else named.Peer).parse_args(argv))
    assert name is not None and peer is not None  # argparse has refused any other name
    given = {key: arguments[key] for key in SHARED if key in arguments}
    options = {option.name: arguments[option.name] for option in fields(peer.Options)}
    try:
        settings = Settings.model_validate(
            {"ranks": RANKS, "checkpoints": 0, "device": "cpu"} | given | {"algorithm": f"peer:{name}"}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigurationError(f"--{where}: {first['msg']}; got {first['input']!r}.") from error
    ranks = settings.ranks or RANKS
    if settings.samples is not None:
        settings.check_budget(settings.samples, f"--samples: {settings.samples:,}", ranks)
    check_condition(settings, ranks)
    check_data_and_model(settings)
    out = arguments["out"]
    with prepared_folder(out, None, ranks):
        print(
            f"training {settings.model} on {settings.data} with {settings.algorithm}: {ranks} ranks, condition "
            f"{settings.condition}; results go to {out}",
            flush=True,
        )
        return train(name, settings, out, ranks, options)


def train(name: str, settings: Settings, out: Path, ranks: int, options: Mapping[str, Any]) -> int:
    """Trains in the folder `out`, with as many samples as a budget in seconds allows; returns the exit code."""
    paths = (str(FOLDER.parent), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # where the ranks find `peers`
    command = ("-m", "lasgd.lab.rank_process", "peers.rank", name, json.dumps(options))
    with explaining_surprises(out), raising_interrupts():  # an emulated network is removed in any case
        if (asked_s := settings.seconds) is not None:
            found = pace(settings, out / PACE_FOLDER, ranks, command, options.get("sync_every", 1))
            if found is None:
                return 1
            settings = within(settings, asked_s, found, ranks)
            print(f"{found:.0f} samples/s, so {settings.samples:,} samples take {asked_s:g} seconds", flush=True)
        return launch(settings, out, None, ranks, command=command)


def pace(settings: Settings, out: Path, ranks: int, command: Sequence[str], sync_every: int) -> float | None:
    """Samples per second of all ranks, from a short run that leaves nothing; None where it failed."""
    steps = max(PACE_STEPS, PACE_SYNCHRONISATIONS * sync_every)
    short = settings.model_copy(
        update={"seconds": None, "samples": steps * ranks * settings.batch_size, "evaluations": 0}
    )
    out.mkdir(parents=True)
    try:
        if launch(short, out, None, ranks, command=command) != 0:
            return None
        record = read_run(out)
        return record.samples / record.wall_s
    finally:
        shutil.rmtree(out, ignore_errors=True)


def within(settings: Settings, seconds: float, samples_per_s: float, ranks: int) -> Settings:
    """The same with as many samples as take `seconds`, and at least one step of every rank."""
    least = ranks * settings.batch_size
    return settings.model_copy(update={"seconds": None, "samples": max(least, round(seconds * samples_per_s))})


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and says what went wrong without a traceback."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except LasgdError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1


if __name__ == "__main__":
    sys.exit(main())
