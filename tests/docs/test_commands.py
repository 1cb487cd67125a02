"""Commands that documents show are ones that work: each is parsed by what it calls."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from documents import DOCUMENTS, ROOT, blocks, text_of

from lasgd.cli.app import app
from lasgd.cli.compare import planned
from lasgd.cli.simulate import check_simulation
from lasgd.cli.train import check
from lasgd.errors import LasgdError
from lasgd.training.settings import Settings, SimulationSettings
from lasgd.training.virtual_setup import cluster

COMMANDS = [
    (block.document, block.line + number, line)
    for document in DOCUMENTS
    for block in blocks(document, "sh")
    for number, line in enumerate(block.text.splitlines())
    if line.strip()
]


def check_lasgd(arguments: list[str]) -> None:
    """Parses as the command does, and looks for options that cannot work together; starts nothing."""
    if arguments[-1] == "--help":
        app.parse_args([*arguments[:-1]], exit_on_error=False, print_error=False)
        return
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if arguments[0] == "simulate" and "--advise" not in arguments:
        simulated = bound.kwargs["settings"]
        check_simulation(simulated, simulated.ranks or 4)
        return
    if arguments[0] == "compare":
        planned(**{name: value for name, value in bound.kwargs.items() if name != "run_limit_s"})
        return
    if arguments[0] == "report":
        return
    settings = bound.kwargs.get("settings") or Settings()
    check(settings, settings.ranks or 4)
    if isinstance(settings, SimulationSettings):
        cluster(settings, settings.ranks or 4, 0.1)


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)
    assert parsed.module and parsed.training_script == "lasgd"
    assert "--out" in parsed.training_script_args  # all ranks need the same
    check_lasgd(parsed.training_script_args)


def check_make(arguments: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True, timeout=30)


def check_pip(arguments: list[str]) -> None:
    assert arguments[:3] == ["-m", "pip", "install"]
    assert arguments[3:] == ["-c", "constraints.txt", "."]
    assert (ROOT / "constraints.txt").is_file()


CHECKS = {"lasgd": check_lasgd, "torchrun": check_torchrun, "make": check_make, "python3": check_pip}


@pytest.mark.parametrize(("document", "line", "command"), COMMANDS, ids=[f"{d}:{n}" for d, n, _ in COMMANDS])
def test_a_command_shown_is_understood(document, line, command):
    program, *arguments = shlex.split(command, comments=True)
    assert program in CHECKS, f"{document}:{line}: nobody has said how to check {program!r}"
    CHECKS[program](arguments)


def test_a_wrong_option_would_be_noticed():
    with pytest.raises(Exception, match="--sample"):
        check_lasgd(["train", "--sample", "4000"])
    with pytest.raises(LasgdError, match="straggle"):
        check_lasgd(["train", "--condition", "straggle=3:4x"])


def test_the_readme_shows_the_two_commands():
    shown = [shlex.split(command, comments=True) for document, _, command in COMMANDS if document == "README.md"]
    assert ["make", "train"] in shown and ["make", "test"] in shown


@pytest.mark.processes
def test_the_readmes_quick_run_runs(tmp_path):
    [command] = [command for _, _, command in COMMANDS if "--samples 4000" in command]
    arguments = [
        str(tmp_path / "run") if word.startswith("runs/") else word for word in shlex.split(command, comments=True)[1:]
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "lasgd", *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert f"results: {tmp_path / 'run'}" in done.stdout
    for name in ("run.json", "metrics.jsonl", "timeline.json.gz", "model.safetensors", "checkpoints"):
        assert name in text_of("README.md")
        assert (tmp_path / "run" / name).exists()
