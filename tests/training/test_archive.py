import fcntl
import io
import multiprocessing
import os
import tarfile
from pathlib import Path

import pytest

from lasgd.errors import DataError
from lasgd.training.archive import data_name, default_cache, unpacked, wait_lock

FILES = {f"set/train/cat/{number}.txt": os.urandom(1500) for number in range(20)}


def make_tar(path: Path, mode: str = "w", files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "mode"), [("set.tar", "w"), ("set.tar.gz", "w:gz"), ("set.tgz", "w:gz"), ("set.tar.xz", "w:xz")]
)
def test_an_archive_is_unpacked_into_a_folder_named_after_it(tmp_path, name, mode):
    folder = unpacked(make_tar(tmp_path / name, mode), tmp_path / "cache")
    assert content(folder) == FILES
    assert folder.name.startswith("set-")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_an_archive_is_unpacked_only_once(tmp_path):
    archive = make_tar(tmp_path / "set.tar")
    seen = []
    folders = [unpacked(archive, tmp_path / "cache", check=seen.append) for _ in range(3)]
    assert len(set(folders)) == len(seen) == 1


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    first = unpacked(make_tar(tmp_path / "set.tar"), tmp_path / "cache")
    second = unpacked(make_tar(tmp_path / "set.tar", files={"other": b"x"}), tmp_path / "cache")
    assert first != second
    assert content(second) == {"other": b"x"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.8])
def test_a_truncated_archive_is_refused_and_leaves_nothing_behind(tmp_path, mode, share):
    archive = make_tar(tmp_path / "set.tar", mode)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"set.tar: is .*(damaged|truncated)"):
        unpacked(archive, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_an_archive_cut_exactly_between_two_files_is_refused_too(tmp_path):
    archive = make_tar(tmp_path / "set.tar")
    with tarfile.open(archive) as tar:
        boundary = tar.getmembers()[7].offset
    archive.write_bytes(archive.read_bytes()[:boundary])
    with pytest.raises(DataError, match="truncated"):
        unpacked(archive, tmp_path / "cache")


def test_a_damaged_header_in_the_middle_is_refused(tmp_path):
    archive = make_tar(tmp_path / "set.tar")
    with tarfile.open(archive) as tar:
        boundary = tar.getmembers()[7].offset
    data = bytearray(archive.read_bytes())
    data[boundary : boundary + 512] = b"?" * 512
    archive.write_bytes(data)
    with pytest.raises(DataError, match=f"at byte {boundary}"):
        unpacked(archive, tmp_path / "cache")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_flipped_bit_in_a_compressed_archive_is_refused(tmp_path, mode):
    archive = make_tar(tmp_path / "set.tar", mode)
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 16
    archive.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        unpacked(archive, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not an archive" * 100)
    with pytest.raises(DataError, match=r"notes.txt: is no tar archive"):
        unpacked(tmp_path / "notes.txt", tmp_path / "cache")


@pytest.mark.parametrize("name", ["../outside", "/absolute/../../outside"])
def test_a_member_that_would_land_outside_is_refused(tmp_path, name):
    archive = make_tar(tmp_path / "set.tar", files={name: b"x"})
    with pytest.raises(DataError, match="a member is unsafe"):
        unpacked(archive, tmp_path / "a" / "cache")
    assert not any((tmp_path / "a" / "cache").iterdir())


@pytest.mark.parametrize("error", [DataError("no train folder"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_check_leaves_nothing_behind(tmp_path, error):
    def check(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        unpacked(make_tar(tmp_path / "set.tar"), tmp_path / "cache", check)
    assert not any((tmp_path / "cache").iterdir())


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    archive = make_tar(tmp_path / "set.tar")
    name = unpacked(archive, tmp_path / "elsewhere").name
    left = tmp_path / "cache" / f".{name}-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    unpacked(archive, tmp_path / "cache")
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be unpacked into .*cache.*XDG_CACHE_HOME"):
        unpacked(make_tar(tmp_path / "set.tar"), tmp_path / "cache")


def test_waiting_for_the_lock_ends_with_an_error_that_names_it(tmp_path):
    lock = tmp_path / "lock"
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="lock: another process has been unpacking for 0 s"), wait_lock(lock, 0.0):
            pass


def test_the_lock_is_free_again_after_use_and_its_file_gone(tmp_path):
    for _ in range(2):
        with wait_lock(tmp_path / "lock", 0.0):
            assert (tmp_path / "lock").exists()
        assert not (tmp_path / "lock").exists()


def _unpack_and_note(archive: Path, cache: Path, notes: Path, start) -> None:
    def note(folder: Path) -> None:
        with open(notes, "a") as file:
            file.write("unpacked\n")

    start.wait(20)
    assert content(unpacked(archive, cache, note)) == FILES


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_four_processes_that_start_at_once_unpack_once(tmp_path):
    archive = make_tar(tmp_path / "set.tar.xz", "w:xz")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    arguments = (archive, tmp_path / "cache", tmp_path / "notes", start)
    ranks = [context.Process(target=_unpack_and_note, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0, 0]
    assert (tmp_path / "notes").read_text() == "unpacked\n"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lasgd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "lasgd"


@pytest.mark.parametrize("name", ["cifar10.tar.xz", "cifar10.tgz", "cifar10.tar", "cifar10"])
def test_a_data_set_is_named_after_its_archive(name):
    assert data_name(Path("somewhere") / name) == "cifar10"
