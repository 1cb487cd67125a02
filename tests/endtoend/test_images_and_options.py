"""Folders of images with something wrong in them, and the options in combination, each in a short real run."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lasgd.lab import network
from lasgd.training.run_folder import read_metrics, read_run
from training_runs import Command, Ranks, finished, running

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

QUICK = ("--model", "cnn4", "--evaluations", "2", "--checkpoints", "2", "--out", "run")
NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, num_classes))
"""


def make_pictures(root: Path, classes=("cat", "dog"), each=8) -> Path:
    """Small photographs of noise, dark for one class and light for the next."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = draw.integers(0, 128, (12, 12, 3)) + 127 * (index % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.jpg")
    return root


def run(tmp_path: Path, *options: str, world_size: int = 2, code: int = 0) -> str:
    """Runs to the end; what rank 0 has said."""
    with running(Ranks(*options, cwd=tmp_path, world_size=world_size)) as ranks:
        assert ranks.wait() == [code] * world_size, "".join(map(ranks.said, range(world_size)))
        assert not any("Traceback" in ranks.said(rank) for rank in range(world_size))
        return ranks.said(0)


def test_a_truncated_jpeg_is_skipped_counted_and_named_wherever_it_lies(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    for damaged in (pictures / "train" / "cat" / "3.jpg", pictures / "val" / "dog" / "5.jpg"):
        damaged.write_bytes(damaged.read_bytes()[:300])
    said = run(tmp_path, "--data", "pictures", "--samples", "600", *QUICK)
    record = finished(tmp_path / "run")
    assert sorted(name.split(":")[0] for name in record.skipped_images) == ["train/cat/3.jpg", "val/dog/5.jpg"]
    assert "skipped image train/cat/3.jpg" in said
    assert "2 images could not be decoded and skipped" in " ".join(said.split())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: [file.unlink() for file in (root / "train" / "dog").iterdir()], "train/dog: this class is empty"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "dgo"), "val lacks 'dog'; train lacks 'dgo'"),
        (lambda root: (root / "val").rename(root / "test"), "expected train/<class>/<images> and val/<class>/<images>"),
        (lambda root: root.rename(root.parent / "elsewhere"), "no file or folder 'pictures'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_the_rank_itself_too(tmp_path, spoil, expected):
    spoil(make_pictures(tmp_path / "pictures"))
    assert expected in run(tmp_path, "--data", "pictures", *QUICK, world_size=1, code=2)
    make_pictures(tmp_path / "good")  # and the run folder is free for the next attempt
    run(tmp_path, "--data", "good", "--samples", "64", *QUICK, world_size=1)


def test_an_archive_is_unpacked_once_for_all_ranks(tmp_path):
    with tarfile.open(tmp_path / "pictures.tar.xz", "w:xz") as tar:
        tar.add(make_pictures(tmp_path / "pictures"), "pictures")
    with running(
        Ranks(
            *("--data", "pictures.tar.xz", "--samples", "600", *QUICK),
            cwd=tmp_path,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
    ) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    record = finished(tmp_path / "run")
    assert record.settings["data"] == "pictures.tar.xz"
    assert len(list((tmp_path / "cache" / "lasgd").iterdir())) == 1


def test_padded_steps_a_straggler_stalls_and_slow_rounds_show_in_the_record(tmp_path):
    condition = "step=20ms+straggler=1:3x+stall=50ms@5%+round=100ms"
    run(tmp_path, *QUICK, "--samples", "4000", "--condition", condition, "--fragments", "3")
    record = finished(tmp_path / "run")
    assert record.condition == "straggler=1:3x+stall=50ms@5%+step=20ms+round=100ms"
    quick, slow = record.ranks
    assert slow.local_steps < quick.local_steps
    assert quick.compute_s >= 0.020 * quick.local_steps
    assert slow.compute_s >= 0.060 * slow.local_steps
    assert record.fragments == 3
    assert record.wall_s >= 0.1 / 3 * 0.99 * (quick.rounds - 1)  # a third of the vector, a third of the time
    assert 0 <= record.padding_overrun <= 1


def test_a_link_is_emulated_and_the_run_says_how(tmp_path):
    options = (*QUICK, "--samples", "2000", "--condition", "link=20mbit+step=20ms")
    with running(Command("--ranks", "2", *options, cwd=tmp_path)) as command:
        assert command.wait() == 0, command.err
    record = finished(tmp_path / "run")
    if (why_not := network.why_not_namespaces()) is None:
        assert record.link_emulation == "namespaces"
        assert command.err == ""
    else:
        assert record.link_emulation == "user space"
        assert why_not in command.err
    # The replica of 1.56 MB takes 0.63 s at 20 Mbit/s, whatever it is cut into; the last time is after the agreed end.
    vectors = record.ranks[0].bytes_sent / 1.56e6
    assert record.wall_s > 0.5 * (vectors - 1)


def test_without_a_supervisor_the_link_is_emulated_by_the_ranks(tmp_path):
    said = run(tmp_path, *QUICK, "--samples", "2000", "--condition", "link=50mbit+step=20ms", "--workers", "0")
    assert finished(tmp_path / "run").link_emulation == "user space"
    assert re.search(r"link emulation +user space", said)


def test_a_coarse_wire_format_sends_fewer_bytes_and_ends_with_equal_replicas(tmp_path):
    options = ("--samples", "4000", "--fragments", "1", "--condition", "step=10ms", "--workers", "0")
    sent = {}
    for wire in ("fp32", "int8"):
        (tmp_path / wire).mkdir()
        run(tmp_path / wire, *QUICK, *options, "--wire", wire)
        record = finished(tmp_path / wire / "run")
        assert record.replicas_identical is True
        sent[wire] = record.ranks[0].bytes_sent / record.ranks[0].rounds
    assert sent["int8"] < 0.35 * sent["fp32"]


def test_batch_norm_buffers_are_averaged_too(tmp_path):
    run(tmp_path, *QUICK, "--samples", "4000", "--norm", "batch", "--condition", "step=10ms", "--seed", "3")
    record = finished(tmp_path / "run")
    assert record.final is not None
    assert (record.final.top1 or 0) > 0.3  # far from chance: the averaged statistics fit the averaged weights


def test_a_model_from_the_current_folder_trains_without_workers(tmp_path):
    (tmp_path / "my_models.py").write_text(NET)
    options = ("--model", "my_models:Net", *QUICK[2:], "--samples", "12000", "--workers", "0")
    run(tmp_path, *options, "--condition", "step=5ms", world_size=3)
    record = finished(tmp_path / "run")
    assert record.world_size == len(record.ranks) == 3
    assert (record.final.top1 or 0) > 0.5  # type: ignore[union-attr]


def test_independent_ranks_send_nothing_and_end_at_their_share(tmp_path):
    run(tmp_path, *QUICK, "--samples", "2000", "--batch-size", "32", "--algorithm", "independent")
    record = read_run(tmp_path / "run")
    assert record.status == "finished"
    assert record.replicas_identical is False
    assert [rank.bytes_sent for rank in record.ranks] == [0, 0]
    assert [rank.samples for rank in record.ranks] == [1024, 1024]  # half the budget, rounded up to whole batches
    assert record.samples == 2048
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["samples"] == 2048
