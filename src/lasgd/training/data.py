"""The data of the recipe: from a name, a folder or an archive to batches that depend on (seed, rank, position) alone.

Reading order: `open_data` finds the images and decides size, channels and augmentation; `training_batches` and
`validation_batches` deliver them. Listing and decoding files is in images.py, unpacking in archive.py, the order in
order.py, the worker processes in workers.py.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lasgd.errors import DataError, unknown
from lasgd.training import archive, augment, order
from lasgd.training.images import (
    ArrayImages,
    Fit,
    FolderImages,
    Images,
    Label,
    Listing,
    Pixels,
    find_layout,
    list_classes,
    some,
)
from lasgd.training.workers import InOrder

KNOWN = ("digits",)
LARGEST_OWN_SIZE = 96  # pixels a side up to which images that share a size keep it
PHOTOGRAPH_SIZE = 224
PROBED = 64  # files whose headers decide size and channels
GIVE_UP_AFTER = 100  # unreadable images in a row
PIPED_BYTES = 2**20  # a batch up to this size travels through a pipe
PREFETCHED_BYTES = 64 * 2**20  # of one worker, roughly

# The colours of ImageNet's training images, mean and spread per channel of [0, 1], as the field uses them for any
# photographs; grey is their average. Scaled to the 0 to 255 of the files.
RGB_MEAN, RGB_STD = (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
GREY_MEAN, GREY_STD = (0.449 * 255,), (0.226 * 255,)
# Over all 1797 digits, whose pixels run from 0 to 16.
DIGITS_MEAN, DIGITS_STD = (4.884,), (6.017,)


@dataclass(frozen=True)
class ImageData:
    """A data set, opened: nothing is decoded yet."""

    name: str
    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    channels: int
    """1 or 3."""
    image_size: int
    """Pixels a side of what the model sees."""
    train: Images
    val: Images
    augmentation: augment.Augmentation
    mean: tuple[float, ...]
    """Per channel, in the units of the pixels."""
    std: tuple[float, ...]
    ignored_files: int = 0
    """Files in class folders that are no images by their ending."""


@dataclass(frozen=True)
class Batch:
    """One batch of one rank. The receiver owns the tensors."""

    images: Tensor  # (B, C, H, W) float32, normalised
    labels: Tensor  # (B,) int64
    position: int
    """The rank's samples before this batch, since the start of the run."""
    skipped: tuple[str, ...]
    """Files that could not be read and were replaced by the next one, each with the reason."""

    def __reduce__(self) -> tuple[Any, ...]:
        """On its way from a worker: large ones in shared memory, small ones through a pipe, quicker for them."""
        if self.images.nbytes > PIPED_BYTES:
            return Batch, (self.images, self.labels, self.position, self.skipped)
        return _from_arrays, (self.images.numpy(), self.labels.numpy(), self.position, self.skipped)


def _from_arrays(images: np.ndarray, labels: np.ndarray, position: int, skipped: tuple[str, ...]) -> Batch:
    return Batch(torch.from_numpy(images), torch.from_numpy(labels), position, skipped)


def open_data(name_or_path: str, image_size: int | None = None, cache: Path | None = None) -> ImageData:
    """Opens `digits`, a folder with train/<class>/* and val/<class>/*, or a tar archive of one.

    `image_size` None: the images' own size where the probed ones share one, square and up to 96; else 224.
    An archive is unpacked once into `cache` (default: `archive.default_cache()`).

    Raises DataError, saying what was expected and what was found.
    """
    if name_or_path == "digits":
        return _open_digits(image_size)
    path = Path(name_or_path).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path, path.resolve().name, image_size)
        if path.is_file():
            folder = archive.unpacked(path, cache, check=find_layout)
            return _open_folder(folder, archive.data_name(path), image_size)
        raise _not_there(name_or_path, path)
    except OSError as error:
        raise DataError(f"{name_or_path}: cannot be read: {error}") from error


def _not_there(name: str, path: Path) -> DataError:
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    beside = {str(path.parent / sibling) for sibling in siblings[:1000] if not sibling.startswith(".")}
    close = str(unknown("", str(path), beside)).rpartition(" Did you mean ")
    hint = f" The nearest name there is {close[2].rstrip('?')}." if close[1] else ""
    where = path.parent.resolve()
    there = f"no file or folder {path.name!r} in {where}" if siblings else f"no folder {str(where)!r}"
    return DataError(f"{unknown('data set', name, KNOWN)} There is {there} either.{hint}")


def _open_digits(image_size: int | None) -> ImageData:
    if image_size not in (None, 8):
        raise DataError(f"the digits are 8x8 pixels and stay so; got image size {image_size}. Leave --image-size out.")
    flat, labels = _load_digits()  # (1797, 64) floats 0 to 16, (1797,)
    pixels = flat.astype(np.uint8).reshape(-1, 8, 8, 1)
    held_out = np.zeros(len(labels), bool)
    for label in range(10):  # a fifth of each class, the same for every seed
        members = np.flatnonzero(labels == label)
        held_out[members[order.permutation(len(members), order.SPLIT, label)[: round(len(members) / 5)]]] = True
    return ImageData(
        name="digits",
        classes=tuple(str(label) for label in range(10)),
        channels=1,
        image_size=8,
        train=ArrayImages(pixels[~held_out], labels[~held_out]),
        val=ArrayImages(pixels[held_out], labels[held_out]),
        augmentation="shift",
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
    )


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """What `sklearn.datasets.load_digits` gives, where possible without the seconds that importing sklearn takes."""
    package = importlib.util.find_spec("sklearn")
    for place in (package and package.submodule_search_locations) or ():
        file = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")  # (1797, 65), the label last
            return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.data, digits.target


def _open_folder(folder: Path, name: str, image_size: int | None) -> ImageData:
    root = find_layout(folder)
    classes = list_classes(root / "train")
    _check_same_classes(root, classes, list_classes(root / "val"))
    train, val = Listing(root / "train", classes), Listing(root / "val", classes)
    own_size, grey = _probe(train)
    _probe(val)  # whether any can be read: better known now than after the training
    mode = "L" if grey else "RGB"
    small = own_size is not None and (own_size <= LARGEST_OWN_SIZE or own_size == image_size)
    size = image_size or (own_size if small and own_size else PHOTOGRAPH_SIZE)
    return ImageData(
        name=name,
        classes=tuple(classes),
        channels=len(mode),
        image_size=size,
        train=FolderImages(train, Fit("square" if small else "whole", size, mode)),
        val=FolderImages(val, Fit("square" if small else "centre", size, mode)),
        augmentation="shift and flip" if small else "crop and flip",
        mean=GREY_MEAN if grey else RGB_MEAN,
        std=GREY_STD if grey else RGB_STD,
        ignored_files=train.ignored_files + val.ignored_files,
    )


def _check_same_classes(root: Path, train: list[str], val: list[str]) -> None:
    not_in_val = [name for name in train if name not in set(val)]
    not_in_train = [name for name in val if name not in set(train)]
    if not_in_val or not_in_train:
        missing = [f"val lacks {some(not_in_val)}"] * bool(not_in_val)
        missing += [f"train lacks {some(not_in_train)}"] * bool(not_in_train)
        raise DataError(f"{root}: train and val need the same class folders, but {'; '.join(missing)}.")


def _probe(listing: Listing) -> tuple[int | None, bool]:
    """The side that all probed files share (None: they differ, or are not square), and whether all are grey."""
    sizes, modes, failures = set(), set(), []
    for index in np.unique(np.linspace(0, len(listing) - 1, PROBED).round().astype(int)).tolist():
        try:
            with listing.opened(index) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        except DataError as error:
            failures.append(str(error))
    if not sizes:
        raise DataError(f"{listing.split}: none of {len(failures)} images looked at can be read: {some(failures, 3)}.")
    width, height = min(sizes)
    return (width if len(sizes) == 1 and width == height else None), modes <= {"1", "L", "I", "I;16", "I;16B"}


class ValidationBatches(AbstractContextManager["ValidationBatches"]):
    """An iterator over the validation images in order; `validation_batches` makes it."""

    def __init__(self, batches: InOrder[Batch]) -> None:
        self.skipped: tuple[str, ...] = ()
        """Files left out so far because they could not be read, each with the reason."""
        self._batches = batches
        self._any_readable = False

    def __iter__(self) -> ValidationBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        for batch in self._batches:
            self.skipped += batch.skipped
            if len(batch.labels):
                self._any_readable = True
                return batch.images, batch.labels
        if self.skipped and not self._any_readable:
            raise DataError(f"no validation image can be read: {some(self.skipped, 3)}.")
        raise StopIteration

    def close(self) -> None:
        """Ends the workers; needed only where the iteration does not reach its end. May be called twice."""
        self._batches.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    data: ImageData, *, seed: int, rank: int, batch_size: int, position: int, workers: int
) -> InOrder[Batch]:
    """The batches of rank `rank` from `position` (its samples so far) on, without end. Close it (or use `with`).

    Order and augmentation are pure functions of (seed, rank, position): neither `workers` nor where a run was resumed
    changes a bit. An image that cannot be read is replaced by the next readable one of the data set and named in
    `Batch.skipped`.

    Iterating raises DataError where 100 images in a row cannot be read, or where a worker died.
    """
    augment.augmenter(data.augmentation, data.image_size)  # imported here once, not in each worker
    source = TrainingSource(data, seed, rank, batch_size)
    return InOrder(source, count(position, batch_size), workers, batches_ahead(data, batch_size))


def validation_batches(data: ImageData, batch_size: int, workers: int) -> ValidationBatches:
    """All validation images once, in order, as (images (B, C, H, W) float32 normalised, labels (B,) int64).

    Images that cannot be read are left out and named in its `skipped`; a batch may be smaller for it.
    Iterating raises DataError where none can be read, or where a worker died.
    """
    source = _ValidationSource(data, batch_size)
    return ValidationBatches(
        InOrder(source, range(0, len(data.val), batch_size), workers, batches_ahead(data, batch_size))
    )


def batches_ahead(data: ImageData, batch_size: int) -> int:
    """How many batches one worker draws before they are asked for."""
    batch_bytes = 4 * batch_size * data.channels * data.image_size**2
    return max(2, min(8, PREFETCHED_BYTES // batch_bytes))


@dataclass(frozen=True)
class TrainingSource:
    """The batch of one rank that begins at a position."""

    data: ImageData
    seed: int
    rank: int
    batch_size: int

    def __getitem__(self, position: int) -> Batch | DataError:
        skipped: list[str] = []
        try:
            drawn = order.indices(len(self.data.train), self.seed, self.rank, position, self.batch_size)
            examples = [_readable(self.data.train, index, skipped) for index in drawn]
        except DataError as error:
            return error  # as a value: torch would wrap a raised one into a worker's traceback
        with augment.drawing_from(order.seed_of(order.AUGMENTATION, self.seed, self.rank, position)):
            images = augment.augmenter(self.data.augmentation, self.data.image_size)([image for image, _ in examples])
        return _batch(self.data, images, [label for _, label in examples], position, skipped)


@dataclass(frozen=True)
class _ValidationSource:
    data: ImageData
    batch_size: int

    def __getitem__(self, begin: int) -> Batch:
        examples: list[tuple[Pixels, Label]] = []
        skipped: list[str] = []
        for index in range(begin, min(begin + self.batch_size, len(self.data.val))):
            try:
                examples.append(self.data.val[index])
            except DataError as error:
                skipped.append(str(error))
        images = (
            augment.stacked([image for image, _ in examples]) if examples else torch.empty(0, self.data.channels, 1, 1)
        )
        return _batch(self.data, images, [label for _, label in examples], begin, skipped)


def _batch(data: ImageData, images: Tensor, labels: list[Label], position: int, skipped: list[str]) -> Batch:
    images = augment.normalised(images, data.mean, data.std)
    return Batch(images, torch.tensor(labels, dtype=torch.int64), position, tuple(skipped))


def _readable(images: Images, index: int, skipped: list[str]) -> tuple[Pixels, Label]:
    """Image `index`, or the next one that can be read."""
    failures: list[str] = []
    for step in range(min(GIVE_UP_AFTER, len(images))):
        try:
            example = images[(index + step) % len(images)]
        except DataError as error:
            failures.append(str(error))
        else:
            skipped += failures
            return example
    raise DataError(f"{len(failures)} training images in a row cannot be read: {some(failures, 3)}.")
