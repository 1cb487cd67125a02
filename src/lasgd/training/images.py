"""Images that can be asked for by number: a list of files with their labels, or an array; and how a file is decoded.

A data set is handed to every worker process, so it holds a million names as one blob of bytes and an array of offsets:
a million Python strings would be copied into each worker, page by page, as their reference counts change.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from lasgd.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".ppm", b".pgm", b".tif", b".tiff")

Label = int
Pixels = np.ndarray  # (H, W, C) uint8, possibly read-only


class Images(Protocol):
    """A map-style data set of labelled images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Pixels, Label]:
        """Raises DataError, naming the file, where it cannot be read."""
        ...


class ArrayImages:
    """Images held in memory: `pixels` (N, H, W, C) uint8, `labels` (N,)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Pixels, Label]:
        return self.pixels[index], int(self.labels[index])


@dataclass(frozen=True)
class Fit:
    """How a decoded file becomes pixels."""

    shape: Literal["square", "whole", "centre"]
    """`square`: scaled to `size` pixels a side, cut only where the file is not square. `whole`: the file's own shape,
    at least twice `size` where the file allows it. `centre`: scaled to 256/224 of `size` on the shorter side, and of
    that the middle `size`."""
    size: int
    mode: Literal["L", "RGB"]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Decodes `image`, whose header has been read. Raises what Pillow raises."""
        from PIL import Image

        short = {"square": self.size, "whole": 2 * self.size, "centre": round(self.size * 256 / 224)}[self.shape]
        if min(image.size) > short:
            image.draft(self.mode, (short, short))  # lets the JPEG decoder skip pixels that are scaled away anyway
        image = _with_mode(image, self.mode)
        if self.shape == "whole" or (self.shape == "square" and image.size == (self.size, self.size)):
            return image
        # Cutting before scaling: the same pixels as the other way round, and an image of 20,000 by 2 stays small.
        width, height = image.size
        side = min(width, height) * self.size / short
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    image.load()
    if image.mode.startswith("I"):  # 16 bits a pixel: `convert` would clip instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


class Listing:
    """The image files below one split of an ImageNet-layout folder, by class and then by name, in byte order."""

    def __init__(self, split: Path, classes: Sequence[str]) -> None:
        """Lists the files and reads none. Raises DataError for a class without images."""
        self.split = split
        self.ignored_files = 0
        self._folders = [os.fsencode(split / name) for name in classes]
        names: list[bytes] = []
        counts, offsets = [], [np.zeros(1, np.int64)]
        for folder in self._folders:
            found, ignored = list_images(folder)
            if not found:
                raise DataError(
                    f"{os.fsdecode(folder)}: this class is empty. Expected at least one file ending in "
                    f"{', '.join(os.fsdecode(extension) for extension in EXTENSIONS)}."
                )
            self.ignored_files += ignored
            counts.append(len(found))
            offsets.append(offsets[-1][-1] + np.cumsum([len(name) for name in found]))
            names.append(b"".join(found))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # (N,)
        self._names = b"".join(names)
        self._offsets = np.concatenate(offsets)  # (N + 1,): name i is _names[_offsets[i]:_offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> bytes:
        """The file's path, as the operating system has it."""
        name = self._names[self._offsets[index] : self._offsets[index + 1]]
        return os.path.join(self._folders[self.labels[index]], name)

    def name(self, index: int) -> str:
        """The file's name for people: train/<class>/<file>."""
        return os.path.relpath(self.path(index), os.fsencode(self.split.parent)).decode(errors="backslashreplace")

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """One file as a Pillow image of which the header is read. What goes wrong inside is a DataError naming it."""
        from PIL import Image

        try:
            with open(self.path(index), "rb", buffering=0) as file:
                data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                yield image
        except Exception as error:  # decoders raise whatever they like at damaged files
            raise DataError(f"{self.name(index)}: {_reason(error)}") from error


class FolderImages:
    """The images of a listing, decoded one by one as `fit` says."""

    def __init__(self, listing: Listing, fit: Fit) -> None:
        self.listing = listing
        self.fit = fit

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Pixels, Label]:
        with self.listing.opened(index) as image:
            pixels = np.asarray(self.fit(image))
        return pixels if pixels.ndim == 3 else pixels[:, :, None], int(self.listing.labels[index])


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its own text shows a memory address
        return "is not an image that Pillow can read"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def list_images(folder: bytes) -> tuple[list[bytes], int]:
    """The image files below a class folder, as sorted paths relative to it, and how many other files there are.

    Hidden files and folders do not count; symbolic links to folders are not followed.
    """
    found: list[bytes] = []
    ignored = 0
    pending = [b""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(os.path.join(below, entry.name))
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    found.append(os.path.join(below, entry.name))
                else:
                    ignored += 1
    return sorted(found), ignored


def list_classes(split: Path) -> list[str]:
    """The class folders of a split, in byte order. Raises DataError where there is none."""
    with os.scandir(split) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if not names:
        raise DataError(f"{split}: holds no class folders. Expected {split.name}/<class>/<image files>.")
    return sorted(names, key=os.fsencode)


def find_layout(folder: Path) -> Path:
    """The folder that holds train/ and val/: `folder` itself, or the one folder in it that does.

    Raises DataError, saying what was found instead.
    """
    if _has_splits(folder):
        return folder
    inside = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    candidates = [name for name in inside if _has_splits(folder / name)]
    if len(candidates) == 1:
        return folder / candidates[0]
    raise DataError(
        f"{folder}: expected train/<class>/<images> and val/<class>/<images>, here or in one folder below; "
        f"found {some(inside)}" + (f", of which {some(candidates)} hold both." if candidates else ".")
    )


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() and (folder / "val").is_dir()


def some(names: Iterable[str], limit: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return (shown + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"
