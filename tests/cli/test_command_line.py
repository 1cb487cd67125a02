"""`lasgd` and `lasgd train` up to the point where ranks start."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lasgd
import lasgd.cli.train
import lasgd.lab.launch
import lasgd.training
from lasgd.cli.app import main
from lasgd.errors import ConfigurationError, LasgdError
from lasgd.training.run_folder import RunRecord, write_run
from lasgd.training.settings import Settings


class Launched:
    """Stands in for `launch`: remembers what it was asked to start."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.raises: BaseException | None = None
        self.returns = 0
        self.sigint: object = None

    def __call__(self, settings, out, resume, world_size) -> int:
        self.calls.append((settings, out, resume, world_size))
        self.sigint = signal.getsignal(signal.SIGINT)
        if self.raises is not None:
            raise self.raises
        return self.returns

    @property
    def settings(self) -> Settings:
        return self.calls[-1][0]


@pytest.fixture
def launched(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    launched = Launched()
    monkeypatch.setattr(lasgd.lab.launch, "launch", launched)
    return launched


def refused(capsys, *options: str) -> str:
    """What `lasgd train OPTIONS` says when it is the user's mistake."""
    assert main(["train", *options]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert all(line.startswith("lasgd: ") for line in err.splitlines())
    return err


def test_train_without_options_starts_four_ranks_in_a_new_folder(launched, capsys):
    assert main(["train"]) == 0
    settings, out, resume, world_size = launched.calls[0]
    assert (settings, resume, world_size) == (Settings(ranks=4), None, 4)
    assert out.parent == Path("runs")
    assert out.name.startswith("digits-resnet20-lasgd-")
    assert str(out) in capsys.readouterr().out


def test_two_runs_in_one_second_get_two_folders(launched):
    main(["train"])
    main(["train"])
    assert launched.calls[0][1] != launched.calls[1][1]


def test_options_reach_the_settings(launched, tmp_path):
    options = "--ranks 2 --lr 0.2 --fragments 5 --batch-size 8 --samples 999 --condition step=10ms --out there"
    assert main(["train", *options.split()]) == 0
    wanted = Settings(ranks=2, lr=0.2, fragments=5, batch_size=8, samples=999, condition="step=10ms")
    assert launched.calls == [(wanted, Path("there"), None, 2)]
    assert (tmp_path / "there" / "logs").is_dir()


def test_the_command_line_wins_over_the_config_file(launched, tmp_path):
    (tmp_path / "c.toml").write_text("lr = 0.2\nseed = 3\nranks = 2\n")
    assert main(["train", "--config", "c.toml", "--lr", "0.4"]) == 0
    assert launched.settings == Settings(lr=0.4, seed=3, ranks=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lr -0.1", "lasgd: --lr: must be greater than 0, got -0.1"),
        ("--ranks 0", "lasgd: --ranks: must be greater than or equal to 1, got 0"),
        ("--batch-sze 3", "Unknown option: --batch-sze. Did you mean --batch-size?"),
        ("digits", "unexpected: digits"),
        ("--samples 60", "60 is less than one batch on every rank: 4 ranks times a batch of 32 need at least 128"),
        ("--algorithm lasdg", "algorithm 'lasdg' is not known"),
        ("--algorithm lasdg", "Did you mean 'lasgd'?"),
        ("--merge ful", "Did you mean 'full'?"),
        ("--condition stpe=10ms", "Did you mean 'step'?"),
        ("--condition straggler=4:2x", "no rank 4 among 4 ranks"),
        ("--data digit", "Did you mean 'digits'?"),
        ("--data ./missing", "data set './missing' is not known"),
        ("--image-size 16", "the digits are 8x8 pixels"),
        ("--model resnt20", "Did you mean 'resnet20'?"),
        ("--model no.such:model", "there is no module 'no'"),
        ("--device gpu", "device 'gpu' is not known"),
        ("--samples 1000 --epochs 2", "give one of --samples, --epochs and --seconds"),
        ("--config missing.toml", "missing.toml cannot be read"),
        ("--resume missing", "missing is not a folder"),
    ],
)
def test_a_mistake_is_one_plain_line_and_starts_nothing(launched, capsys, tmp_path, options, said):
    assert said in refused(capsys, *options.split())
    assert launched.calls == []
    assert list(tmp_path.iterdir()) == []


def test_two_mistakes_are_two_lines(launched, capsys):
    assert len(refused(capsys, "--lr", "-1", "--momentum", "2").splitlines()) == 2


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert 'Did you mean "train"?' in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_written_over(launched, capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "full is not empty" in refused(capsys, "--out", "full")
    (tmp_path / "file").touch()
    assert "file cannot be used as a folder" in refused(capsys, "--out", "file")
    assert launched.calls == []


def started_run(folder: Path, settings: Settings) -> Path:
    cut = folder / "checkpoints" / "000001"
    cut.mkdir(parents=True)
    for rank in range(settings.ranks or 4):
        (cut / f"rank-{rank}.pt").touch()
    (folder / "settings.json").write_text(settings.model_dump_json())
    return folder


def test_a_resumed_run_goes_on_in_its_folder_with_its_settings(launched, tmp_path):
    settings = Settings(ranks=3, lr=0.3)
    started_run(tmp_path / "run", settings)
    assert main(["train", "--resume", "run"]) == 0
    assert launched.calls == [(settings, Path("run"), Path("run"), 3)]
    assert main(["train", "--resume", "run", "--out", "elsewhere", "--workers", "0"]) == 0
    assert launched.calls[1] == (Settings(ranks=3, lr=0.3, workers=0), Path("elsewhere"), Path("run"), 3)


def test_resuming_otherwise_or_from_nothing_is_refused(launched, capsys, tmp_path):
    started_run(tmp_path / "run", Settings(ranks=3))
    assert "--lr: 0.2 differs from the resumed run's 0.1" in refused(capsys, "--resume", "run", "--lr", "0.2")
    assert "has 3 ranks, this would have 2" in refused(capsys, "--resume", "run", "--ranks", "2")
    (tmp_path / "run" / "checkpoints" / "000001" / "rank-2.pt").unlink()
    assert "holds no checkpoint of all 3 ranks" in refused(capsys, "--resume", "run")
    assert launched.calls == []


def test_a_finished_run_is_not_resumed_and_stays_as_it_is(launched, capsys, tmp_path):
    run = started_run(tmp_path / "run", Settings(ranks=3))
    record = RunRecord(
        status="finished", algorithm="lasgd", condition="fast", settings={}, environment={}, world_size=3, samples=77
    )
    write_run(run, record)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for options in ((), ("--out", "elsewhere")):
        said = refused(capsys, "--resume", "run", *options)
        assert "the run in run is finished" in said
        assert "Its model is run/model.safetensors" in said
        assert "start a new run" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not (tmp_path / "elsewhere").exists()
    assert launched.calls == []


def test_a_start_that_failed_does_not_block_the_next_attempt(launched, capsys, tmp_path):
    started_run(tmp_path / "run", Settings())
    assert "run is not empty" in refused(capsys, "--out", "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    record = RunRecord(
        status="failed", algorithm="lasgd", condition="fast", settings={}, environment={}, world_size=4, error="no GPU"
    )
    write_run(tmp_path / "run", record)
    (tmp_path / "run" / "logs").mkdir()
    assert main(["train", "--out", "run"]) == 0
    write_run(tmp_path / "run", record.model_copy(update={"status": "finished"}))
    assert "run is not empty" in refused(capsys, "--out", "run")


def test_errors_during_the_run_exit_with_one_and_mistakes_with_two(launched, capsys):
    launched.raises = LasgdError("rank 2 of 4 was killed by SIGKILL")
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "lasgd: rank 2 of 4 was killed by SIGKILL\n"
    launched.raises = ConfigurationError("rank 0: no images")
    assert main(["train"]) == 2
    launched.raises = None
    launched.returns = 130
    assert main(["train"]) == 130
    launched.raises = KeyboardInterrupt()
    assert main(["train"]) == 130


def test_an_interrupted_run_says_how_to_go_on(launched, capsys, tmp_path):
    started_run(tmp_path / "run", Settings())
    launched.returns = 130
    assert main(["train", "--resume", "run"]) == 130
    assert "go on with: lasgd train --resume run" in capsys.readouterr().err


def test_an_unexpected_error_is_a_line_and_its_traceback_a_file(launched, capsys, tmp_path):
    launched.raises = ZeroDivisionError("oh")
    assert main(["train", "--out", "there"]) == 1
    (log,) = (tmp_path / "there" / "logs").iterdir()
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: oh" in err
    assert str(log.relative_to(tmp_path)) in err
    assert "Traceback" in log.read_text()
    launched.raises = OSError(28, "No space left on device", "there/settings.json")
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device: 'there/settings.json'" in err
    assert "bug" not in err


@pytest.fixture
def torchrun(monkeypatch, launched):
    """A rank as torchrun starts it; `run_rank` only remembers."""
    calls: list[tuple] = []
    module = types.ModuleType("lasgd.training.rank")
    module.run_rank = lambda *arguments: calls.append(arguments) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lasgd.training.rank", module)
    monkeypatch.setattr(lasgd.training, "rank", module, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    return calls


def test_under_torchrun_the_process_is_a_rank_and_starts_none(torchrun, launched):
    assert main(["train", "--out", "there"]) == 0
    assert main(["train", "--out", "there", "--condition", "link=20mbit", "--ranks", "3"]) == 0
    slow = Settings(ranks=3, condition="link=20mbit")
    assert torchrun == [(Settings(ranks=3), Path("there"), None, "none"), (slow, Path("there"), None, "user space")]
    assert launched.calls == []


def test_under_torchrun_only_rank_0_prepares_the_folder(torchrun, monkeypatch, tmp_path):
    main(["train", "--out", "there"])
    assert not (tmp_path / "there").exists()
    monkeypatch.setenv("RANK", "0")
    main(["train", "--out", "there"])
    assert (tmp_path / "there" / "settings.json").exists()


def test_under_torchrun_disagreement_and_a_missing_folder_are_refused(torchrun, capsys, monkeypatch):
    assert "--ranks 4 disagrees with torchrun, which started 3" in refused(capsys, "--out", "a", "--ranks", "4")
    assert "give --out" in refused(capsys)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "make no sense together" in refused(capsys)
    assert torchrun == []


@pytest.mark.parametrize("width", [80, 120])
def test_help_names_every_setting_within_the_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for field in (*Settings.model_fields, "out", "config", "resume"):
        assert f"--{field.replace('_', '-')} " in text
    assert "Peak learning rate" in text  # the settings' docstrings show
    assert "train/<class>/*" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{lasgd.__version__}\n"


@pytest.mark.processes
def test_the_command_does_not_load_torch_before_it_must():
    program = "import sys, lasgd.cli.app; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False).returncode == 0


@pytest.mark.processes
def test_closed_standard_streams_do_no_harm():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["sh", "-c", f'"{sys.executable}" -m lasgd --version <&- 2>&-']
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{lasgd.__version__}\n")


def test_ctrl_c_ends_the_command_at_once_but_raises_where_something_is_tidied_away(launched, monkeypatch, tmp_path):
    seen = {}
    check, before = lasgd.cli.train.check, signal.getsignal(signal.SIGINT)

    def noting(*arguments) -> None:
        seen["check"] = signal.getsignal(signal.SIGINT)
        check(*arguments)

    def open_data(*_) -> None:
        seen["open_data"] = signal.getsignal(signal.SIGINT)

    monkeypatch.setattr(lasgd.cli.train, "check", noting)
    monkeypatch.setattr("lasgd.training.data.open_data", open_data)
    (tmp_path / "images.tar").touch()
    assert main(["train", "--data", "images.tar"]) == 0
    assert seen == {"check": signal.SIG_DFL, "open_data": signal.default_int_handler}
    assert launched.sigint is signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is before


INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass
except BaseException:
    pass  # as some modules do
raise SystemExit("the interrupt was swallowed")
"""


@pytest.mark.processes
@pytest.mark.parametrize("module", ["cyclopts", "numpy"])
@pytest.mark.parametrize("launcher", ["-m lasgd", "-c 'import lasgd.__main__ as m; m.main()'"])
def test_ctrl_c_while_the_command_imports_ends_it_without_a_word(tmp_path, module, launcher):
    (tmp_path / f"{module}.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    ended = subprocess.run(
        [sys.executable, *shlex.split(launcher), "train", "--out", "out"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_after_the_end_is_no_interrupted_run(launched, capsys, tmp_path, monkeypatch):
    record = RunRecord(
        status="finished", algorithm="lasgd", condition="fast", settings={}, environment={}, world_size=4
    )

    def launch(settings, out, resume, world_size) -> int:
        write_run(out, record)
        return 130

    monkeypatch.setattr(lasgd.lab.launch, "launch", launch)
    assert main(["train", "--out", "run"]) == 0
    assert "interrupted" not in capsys.readouterr().err
