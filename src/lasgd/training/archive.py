"""Unpacks a tar of images once, into a cache folder that several ranks may want at the same moment.

1. The folder's name holds a digest of the archive's path, size and time of change: a new archive, a new folder.
2. Whoever gets the lock unpacks into a hidden folder beside it and renames it. A folder under its final name is
   therefore complete, and the others, who waited for the lock, find it there.
3. Whatever goes wrong, the hidden folder goes; one that a killed process left is removed by the next lock holder.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lasgd.errors import ConfigurationError, DataError

LOCK_TIMEOUT_S = 600.0


def default_cache() -> Path:
    """The folder for unpacked archives: $XDG_CACHE_HOME/lasgd, else ~/.cache/lasgd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lasgd"


def data_name(archive: Path) -> str:
    """The archive's name without .tar, .tar.xz, .tgz and the like: `cifar10` for cifar10.tar.xz."""
    name = archive.name
    for suffix in (".gz", ".xz", ".bz2", ".tar", ".tgz", ".txz"):
        name = name.removesuffix(suffix)
    return name or archive.name


def unpacked(
    archive: Path,
    cache: Path | None = None,
    check: Callable[[Path], object] = lambda folder: None,
    timeout_s: float = LOCK_TIMEOUT_S,
) -> Path:
    """The folder that holds the content of `archive`, unpacked now or by an earlier call.

    `check` sees the folder before it gets its final name; what it raises ends the call, and nothing is kept.

    Raises DataError where the archive is damaged or no tar, where a member would land outside the folder, where the
    cache cannot be written, or where another process holds the lock for longer than `timeout_s`.
    """
    stat = archive.stat()
    identity = f"{archive.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    name = f"{data_name(archive)}-{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:16]}"
    cache = cache or default_cache()
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with wait_lock(cache / f".{name}.lock", timeout_s):
            if not target.is_dir():
                _unpack(archive, target, check)
    except OSError as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {cache}: {error}. Make room or make it writable, or choose another "
            "cache folder with the environment variable XDG_CACHE_HOME."
        ) from error
    return target


def _unpack(archive: Path, target: Path, check: Callable[[Path], object]) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise ConfigurationError("unpacking an archive safely needs Python 3.11.4 or newer; unpack it by hand instead")
    prefix = f".{target.name}-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _extract(archive, hidden)
        check(hidden)
        hidden.rename(target)
    except BaseException:  # a KeyboardInterrupt leaves nothing behind either
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _extract(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, tarinfo=_StrictTarInfo) as tar:
            tar.extractall(folder, filter="data")
            while tar.fileobj and tar.fileobj.read(2**20):  # to the end, where decompressors compare their checksums
                pass
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: refused, because a member is unsafe: {error}") from error
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{archive}: is no tar archive, or a damaged or truncated one ({_first_line(error)}). "
            "Expected .tar, .tar.gz, .tar.bz2 or .tar.xz; fetch it again."
        ) from error
    except OSError as error:
        # Decompressors report damage as an OSError without a number; a full disk or a missing right has one.
        if error.errno is None:
            raise DataError(f"{archive}: is damaged ({_first_line(error)}); fetch it again.") from error
        raise


class _StrictTarInfo(tarfile.TarInfo):
    """Turns damage between two members into an error; tarfile itself would silently take it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the proper end: a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


@contextmanager
def wait_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Holds an exclusive lock between processes; the file exists only as long as somebody holds or awaits it.

    Raises DataError where it is not free within `timeout_s`.
    """
    import fcntl

    give_up = time.monotonic() + timeout_s
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        raise DataError(
                            f"{path}: another process has been unpacking for {timeout_s:.0f} s. If it is stuck, "
                            "end it; or unpack the archive by hand and give the folder."
                        ) from None
                    time.sleep(0.05)
            # The holder before us removed the file after use: a lock on a removed file excludes nobody, so begin again.
            if _same_file(file, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(file)


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
