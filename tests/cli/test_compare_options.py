"""`lasgd compare` and `lasgd report` up to the point where runs start, and from where they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lasgd.lab.compare.engine as engine
from compare_folders import write_run_folder
from lasgd.cli.app import main
from lasgd.cli.compare import _announced, planned
from lasgd.cli.entries import parse_entries
from lasgd.errors import ConfigurationError
from lasgd.lab.compare.entry import Entry
from lasgd.lab.compare.plan import Cell
from lasgd.training.run_folder import read_json
from lasgd.training.settings import Settings


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch):
    """Command lines of the runs that were started; each has then finished."""
    found: list[list[str]] = []

    def run_child(argv, log, *rest) -> int:
        found.append(list(argv))
        option = {argv[i]: argv[i + 1] for i in range(4, len(argv) - 1, 2)}
        entry = Entry(option["--algorithm"], option["--algorithm"])
        cell = Cell(entry, option["--condition"], int(option["--seed"]))
        write_run_folder(Path(option["--out"]), cell)
        return 0

    monkeypatch.setattr(engine, "run_child", run_child)
    return found


def refused(capsys, *options: str) -> str:
    """What `lasgd compare OPTIONS` says when it is the user's mistake."""
    assert main(["compare", *options]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert all(line.startswith("lasgd: ") for line in err.splitlines())
    assert not Path("runs").exists()
    return err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--algorithms lasdg", "Did you mean 'lasgd'?"),
        ("--algorithms lasgd:lr=abc", "entry 'lasgd:lr=abc': --lr: must be a valid number, got abc"),
        ("--algorithms lasgd:lr=-1", "--lr: must be greater than 0, got -1"),
        ("--algorithms lasgd:momntum=1", "Did you mean 'momentum'?"),
        ("--algorithms lasgd:lr", "'lr' is no setting. Expected setting=value"),
        ("--algorithms lasgd:lr=1:lr=2", "'lr' is given twice"),
        ("--algorithms lasgd,,sync_sgd", "names no algorithm"),
        ("--algorithms lasgd:samples=5", "samples is the same for all entries"),
        ("--algorithms lasgd:seed=1", "Give --seeds."),
        ("--algorithms lasgd:merge=ful", "Did you mean 'full'?"),
        ("--seeds a", "'a' is no seed"),
        ("--seeds 0,1,0", "0 is given twice"),
        ("--seed 1", "Did you mean --seeds?"),
        ("--lr-grid 0.1,0", "'0' is no learning rate"),
        ("--lr-grid 0.1,0.1", "0.1 is given twice"),
        ("--tune virtual", "goes with --lr-grid"),
        ("--target 90", "Did you mean 0.9?"),
        ("--target nan", "--target: must be above 0"),
        ("--reference sync", "Did you mean 'sync_sgd'?"),
        ("--condition slow --condition link=20mbit+step=100ms", "are the same"),
        ("--condition slw", "Did you mean 'slow'?"),
        ("--condition straggler=4:2x", "no rank 4 among 4 ranks"),
        ("--samples 60", "less than one batch on every rank"),
        ("--samples 1000 --epochs 2", "give one of --samples, --epochs and --seconds"),
        ("--run-limit-s 0", "must be greater than 0"),
        ("--data digit", "Did you mean 'digits'?"),
        ("--config missing.toml", "missing.toml cannot be read"),
    ],
)
def test_a_mistake_is_one_plain_line_and_starts_nothing(started, capsys, options, said):
    assert said in refused(capsys, *options.split())
    assert not started


def test_under_torchrun_it_refuses(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "does not run under torchrun" in refused(capsys).replace("rank 0: ", "")


def test_settings_come_from_file_and_command_line(tmp_path):
    Path("c.toml").write_text("lr = 0.3\nbatch-size = 8\nepochs = 3.0\n")
    asked = planned(tmp_path, config=Path("c.toml"), settings=Settings(batch_size=16, samples=1000))
    wanted = {"lr": 0.3, "batch_size": 16, "samples": 1000, "ranks": 4, "evaluations": 20, "checkpoints": 0}
    assert asked.shared == Settings(**wanted)


def test_what_differs_from_run_to_run_is_refused_in_the_file(tmp_path):
    Path("c.toml").write_text("seed = 3\n")
    with pytest.raises(ConfigurationError, match=r"'seed' differs from run to run.*--seeds"):
        planned(tmp_path, config=Path("c.toml"))


def test_the_reference_is_sync_sgd_if_it_is_there_and_else_the_first(tmp_path):
    assert planned(tmp_path, algorithms=["lasgd,sync_sgd"]).reference == "sync_sgd"
    assert planned(tmp_path, algorithms=["local_sgd,lasgd"]).reference == "local_sgd"
    assert planned(tmp_path, algorithms=["sync_sgd,lasgd"], reference="lasgd").reference == "lasgd"


def test_the_same_entry_twice_gets_two_names():
    entries = parse_entries(["lasgd, lasgd ,local_sgd:steps-per-round=10:lr=0.10", "lasgd"], Settings())
    assert [entry.label for entry in entries] == [
        *("lasgd", "lasgd (2)", "local_sgd:steps-per-round=10:lr=0.1", "lasgd (3)")
    ]
    assert entries[2].own == {"steps_per_round": 10.0, "lr": 0.1}
    assert len({entry.slug for entry in entries}) == 4


def test_a_setting_may_be_spelt_with_underscores():
    [entry] = parse_entries(["local_sgd:steps_per_round=5"], Settings())
    assert entry.label == "local_sgd:steps-per-round=5"


OPTIONS = [
    "--algorithms",
    "lasgd,sync_sgd:lr=0.2",
    "--condition",
    "slow",
    "--seeds",
    "0,1",
    "--ranks",
    "2",
    "--samples",
    "1000",
    "--out",
    "there",
]


def test_every_run_is_a_lasgd_train_with_all_settings(started, capsys):
    assert main(["compare", *OPTIONS]) == 0
    assert len(started) == 6  # two entries and the yardstick, twice
    argv = next(argv for argv in started if "sync_sgd" in argv)
    assert argv[1:4] == ["-m", "lasgd", "train"]
    said = " ".join(argv[4:])
    for option in ("--algorithm sync_sgd", "--condition slow", "--seed 0", "--ranks 2", "--samples 1000", "--lr 0.2"):
        assert option in said
    assert "--evaluations 20 --checkpoints 0" in said
    results = read_json(Path("there/results.json"))
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    assert Path("there/report.html").exists() and Path("there/report.md").exists()
    assert "there/report.html" in capsys.readouterr().out


def test_the_command_that_is_stored_asks_for_the_same(started, tmp_path):
    main(["compare", *OPTIONS])
    stored = read_json(Path("there/results.json"))["command"].split()
    before = len(started)
    assert main(stored[1:]) == 0
    assert len(started) == before
    assert read_json(Path("there/results.json"))["command"].split() == stored


def test_other_settings_for_the_same_folder_are_refused_with_what_differs(started, capsys):
    main(["compare", *OPTIONS])
    capsys.readouterr()
    assert main(["compare", *OPTIONS, "--batch-size", "8"]) == 2
    assert "--batch-size: 32 there, 8 now" in capsys.readouterr().err


def test_a_failed_run_gives_exit_code_1_and_one_line(monkeypatch, capsys):
    def run_child(argv, log, *rest) -> int:
        log.write_text("lasgd: rank 1 of 2 was killed\n")
        return 1

    monkeypatch.setattr(engine, "run_child", run_child)
    assert main(["compare", *OPTIONS]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "4 of 4 runs did not finish" in err and "rank 1 of 2 was killed" in err
    assert "rank 1 of 2 was killed" in Path("there/report.md").read_text()
    assert "report: there/report.html" in out


def test_an_interrupt_gives_130_a_report_and_the_way_on(monkeypatch, capsys):
    def run_child(argv: Any, log: Path, interrupts: Any, *rest: Any) -> int:
        interrupts.count += 1
        return 130

    monkeypatch.setattr(engine, "run_child", run_child)
    assert main(["compare", *OPTIONS]) == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted; go on with: lasgd compare --algorithms lasgd,sync_sgd:lr=0.2")
    assert Path("there/report.html").exists()
    assert {run["status"] for run in read_json(Path("there/results.json"))["runs"]} == {"interrupted", "missing"}


# lasgd report


def test_a_report_is_made_anew_from_the_folder(started):
    main(["compare", *OPTIONS])
    before = Path("there/report.html").read_text()
    Path("there/report.html").unlink()
    assert main(["report", "there"]) == 0
    assert Path("there/report.html").read_text() == before


def test_several_folders_become_one_report_elsewhere(started, capsys):
    main(["compare", *OPTIONS])
    main(["compare", *OPTIONS[:-1], "other"])
    assert main(["report", "there", "other"]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert main(["report", "there", "other", "--out", "both"]) == 0
    assert "lasgd [other]" in Path("both/report.md").read_text()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, "is not a folder"),
        (lambda: Path("there").mkdir(), "holds no results.json"),
        (lambda: _write({}), "is not the results of this version"),
        (lambda: _write([]), "is not the results of this version"),
        (lambda: Path("there").mkdir() or Path("there/results.json").write_text("{"), "not JSON"),
    ],
)
def test_what_is_no_comparison_is_refused(capsys, make, said):
    make()
    assert main(["report", "there"]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_report_of_nothing_is_refused(capsys):
    assert main(["report"]) == 2
    assert "needs a folder" in capsys.readouterr().err


def _write(value: Any) -> None:
    Path("there").mkdir()
    Path("there/results.json").write_text(json.dumps(value))


def test_entries_whose_learning_rate_is_given_are_named_where_a_grid_is_tried():
    def said(grid):
        entries = ["lasgd", "sync_sgd:lr=0.4"]
        return _announced(planned(Path("there"), algorithms=entries, lr_grid=grid), Path("there"))

    assert said(["0.1,0.2"]).splitlines()[1] == "not tuned, for their learning rate is given: sync_sgd:lr=0.4"
    assert len(said(None).splitlines()) == 1
