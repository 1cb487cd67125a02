"""Trains one rank with a peer: `python -m peers.rank PEER OPTIONS OUT --link-emulation X`, as run.py starts it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lasgd.training.run_folder import read_json
from lasgd.training.settings import Settings
from peers import named
from peers.common import Run


def main(argv: list[str]) -> int:
    """The entry of a launched rank."""
    parser = argparse.ArgumentParser(prog="peers.rank")
    parser.add_argument("peer")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("out", type=Path)
    parser.add_argument("--link-emulation", default="none")
    arguments = parser.parse_args(argv)
    peer = named.load(arguments.peer)
    options = peer.Options(**arguments.options)
    settings = Settings.model_validate(read_json(arguments.out / "settings.json"))
    run = Run(settings, arguments.out, arguments.link_emulation)
    peer.train(run, options)
    run.finish(asdict(options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
