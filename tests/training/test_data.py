import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lasgd.errors import DataError
from lasgd.training import data as data_module
from lasgd.training.data import Batch, ImageData, open_data, training_batches, validation_batches
from lasgd.training.images import Listing, list_images

one_core = pytest.mark.filterwarnings("ignore:This DataLoader will create")
EXAMPLES = Path(os.environ.get("LASGD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def picture(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_folder(root: Path, *, size=(16, 16), mode="RGB", suffix="png", classes=("cat", "dog"), train=6, val=3) -> Path:
    """A folder in ImageNet layout; `size` is one (width, height) or a list to cycle through."""
    sizes = itertools.cycle(size if isinstance(size, list) else [size])
    seeds = itertools.count()
    for split, number in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                picture(*next(sizes), next(seeds), mode).save(folder / f"{index}.{suffix}")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pets")


def batches(data: ImageData, count: int, *, position=0, seed=0, rank=0, batch_size=4, workers=0) -> list[Batch]:
    with training_batches(
        data, seed=seed, rank=rank, batch_size=batch_size, position=position, workers=workers
    ) as endless:
        return list(itertools.islice(endless, count))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.position == b.position
        for a, b in zip(left, right, strict=True)
    )


# Opening


def test_the_digits_are_split_four_to_one_in_every_class():
    data = open_data("digits")
    assert (data.channels, data.image_size, data.classes) == (1, 8, tuple("0123456789"))
    train, val = (np.bincount([split[index][1] for index in range(len(split))]) for split in (data.train, data.val))
    assert train.sum() + val.sum() == 1797
    assert np.abs(val / (train + val) - 0.2).max() < 0.005  # rounding to whole images, of about 180 a class


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    for ours, theirs in zip(data_module._load_digits(), load_digits(return_X_y=True), strict=True):
        assert np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_the_digits_are_split_the_same_way_every_time_and_share_no_image():
    first, second = open_data("digits"), open_data("digits")
    assert np.array_equal(first.val.pixels, second.val.pixels)
    assert not {image.tobytes() for image in first.train.pixels} & {image.tobytes() for image in first.val.pixels}


def test_the_digits_are_normalised_to_zero_mean_and_unit_variance():
    data = open_data("digits")
    values = (np.concatenate([data.train.pixels, data.val.pixels]) - data.mean[0]) / data.std[0]
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 1) < 1e-3


def test_the_digits_keep_their_size():
    assert open_data("digits", 8).image_size == 8
    with pytest.raises(DataError, match=r"8x8 pixels and stay so; got image size 32"):
        open_data("digits", 32)


def test_a_folder_gives_its_classes_in_order_and_its_images_with_their_labels(folder):
    data = open_data(str(folder))
    assert (data.name, data.classes, data.channels, data.image_size) == ("pets", ("cat", "dog"), 3, 16)
    assert [data.train[index][1] for index in range(12)] == [0] * 6 + [1] * 6
    assert np.array_equal(data.train[7][0], np.asarray(Image.open(folder / "train" / "dog" / "1.png")))


def test_an_archive_with_or_without_a_folder_on_top_is_as_good_as_the_folder(folder, tmp_path):
    for name, top in (("a.tar", "pets"), ("b.tar.xz", ".")):
        with tarfile.open(tmp_path / name, "w:xz" if name.endswith("xz") else "w") as tar:
            tar.add(folder, top)
        data = open_data(str(tmp_path / name), cache=tmp_path / "cache")
        assert same(batches(data, 2), batches(open_data(str(folder)), 2))
    assert data.name == "b"


def test_an_archive_of_something_else_is_refused_and_not_kept(tmp_path):
    (tmp_path / "notes").write_text("hello")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "notes", "notes")
    with pytest.raises(DataError, match=r"expected train/<class>/<images> and val/<class>/<images>.*found 'notes'"):
        open_data(str(tmp_path / "a.tar"), cache=tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digitz",
            r"data set 'digitz' is not known. Known: digits. Did you mean 'digits'\? There is no file or folder",
        ),
        ("{tmp}/pet", r"There is no file or folder 'pet' in .* either. The nearest name there is '.*/pets'"),
        ("{tmp}/nowhere/pets", r"There is no folder '.*/nowhere' either"),
    ],
)
def test_an_unknown_data_set_is_named_with_what_comes_nearest(folder, tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        open_data(name.format(tmp=tmp_path))


def test_a_folder_of_another_structure_is_refused_with_what_was_found(tmp_path):
    for name in ("training", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"expected train/<class>/<images> .*found 'test', 'training'\."):
        open_data(str(tmp_path))


def test_two_data_sets_in_one_folder_are_not_chosen_between(tmp_path):
    for name in ("a", "b"):
        make_folder(tmp_path / name, train=1, val=1)
    with pytest.raises(DataError, match=r"of which 'a', 'b' hold both"):
        open_data(str(tmp_path))


def test_classes_that_differ_between_train_and_val_are_listed(folder):
    (folder / "train" / "dog").rename(folder / "train" / "wolf")
    with pytest.raises(DataError, match=r"same class folders, but val lacks 'wolf'; train lacks 'dog'\."):
        open_data(str(folder))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(folder, split):
    for file in (folder / split / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(DataError, match=rf"{split}/dog: this class is empty. Expected .*\.jpg"):
        open_data(str(folder))


def test_a_split_without_class_folders_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"train: holds no class folders. Expected train/<class>"):
        open_data(str(tmp_path))


def test_hidden_files_do_not_count_and_other_files_are_counted(folder):
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"")
    (folder / "train" / "cat" / "._0.png").write_bytes(b"")
    (folder / "train" / "cat" / "labels.csv").write_bytes(b"")
    (folder / "val" / "dog" / "README").write_bytes(b"")
    data = open_data(str(folder))
    assert (len(data.train), data.classes, data.ignored_files) == (12, ("cat", "dog"), 2)


def test_images_in_folders_below_a_class_belong_to_it(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b.JPEG", "images/a.png", "a.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert list_images(os.fsencode(tmp_path)) == ([b"a.jpg", b"b.JPEG", b"images/a.png"], 0)


def test_names_of_any_bytes_are_found_again_and_shown(tmp_path):
    name = os.fsencode(tmp_path) + b"/train/cat/\xff\xfe.png"
    make_folder(tmp_path, train=1, val=1)
    os.rename(tmp_path / "train" / "cat" / "0.png", name)
    listing = Listing(tmp_path / "train", ["cat", "dog"])
    assert listing.path(0) == name
    assert listing.name(0) == r"train/cat/\xff\xfe.png"


def test_a_listing_holds_no_python_object_per_file(folder):
    listing = Listing(folder / "train", ["cat", "dog"])
    attributes = [value for value in vars(listing).values() if isinstance(value, list | tuple | dict | set)]
    assert max(map(len, attributes)) == 2  # the class folders


@pytest.mark.parametrize(
    ("size", "given", "expected", "augmentation"),
    [
        ((20, 20), None, 20, "shift and flip"),
        ((20, 20), 12, 12, "shift and flip"),
        ((96, 96), None, 96, "shift and flip"),
        ((97, 97), None, 224, "crop and flip"),
        ((97, 97), 97, 97, "shift and flip"),
        ((97, 97), 64, 64, "crop and flip"),
        ((20, 24), None, 224, "crop and flip"),
        ([(20, 20), (24, 24)], 16, 16, "crop and flip"),
    ],
)
def test_the_image_size_is_the_files_own_or_that_of_photographs(tmp_path, size, given, expected, augmentation):
    data = open_data(str(make_folder(tmp_path, size=size, train=2, val=1)), given)
    assert (data.image_size, data.augmentation) == (expected, augmentation)
    (batch,) = batches(data, 1)
    assert batch.images.shape == (4, 3, expected, expected)
    for images, labels in validation_batches(data, 2, 0):
        assert images.shape == (len(labels), 3, expected, expected)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_grey_files_give_one_channel_and_all_others_three(tmp_path, mode, channels, suffix):
    data = open_data(str(make_folder(tmp_path, mode=mode, suffix=suffix, train=2, val=1)))
    if suffix != "webp":  # a format that knows no grey
        assert data.channels == channels
    assert batches(data, 1)[0].images.shape == (4, data.channels, 16, 16)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_files_of_an_unusual_mode_among_colour_ones_are_converted(folder, mode):
    grey = Image.fromarray(np.full((16, 16), 130, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 130 * 257, np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode, dither=Image.Dither.NONE)
    image.save(folder / "train" / "cat" / ("0.tif" if mode == "CMYK" else "0.png"))
    if mode == "CMYK":
        (folder / "train" / "cat" / "0.png").unlink()
    pixels, label = open_data(str(folder)).train[0]
    assert pixels.shape == (16, 16, 3)
    assert label == 0
    assert np.abs(pixels.astype(int) - (255 if mode == "1" else 130)).max() <= 3  # the palette is coarse


def test_a_large_photograph_is_decoded_at_reduced_size(tmp_path):
    data = open_data(str(make_folder(tmp_path, size=(800, 640), suffix="jpg", train=1, val=1)), 32)
    assert data.train[0][0].shape == (80, 100, 3)  # an eighth, still at least twice 32
    assert data.val[0][0].shape == (32, 32, 3)


def test_validation_shows_the_middle_of_a_photograph(tmp_path):
    folder = make_folder(tmp_path, size=(140, 70), train=1, val=1)
    image = np.zeros((70, 140, 3), np.uint8)
    image[4:66, 39:101] = 255  # a little more than the middle 224/256 of the shorter side
    Image.fromarray(image).save(folder / "val" / "cat" / "0.png")
    ((images, labels),) = validation_batches(open_data(str(folder), 32), 8, 0)
    assert labels.tolist() == [0, 1]
    assert torch.allclose(images[0].mean((1, 2)), torch.tensor([(1 - 0.485) / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


# Batches


@pytest.mark.processes
@pytest.mark.timeout(60)
@one_core
@pytest.mark.parametrize("kind", ["digits", "small", "photographs"])
def test_the_number_of_workers_changes_no_bit(tmp_path, kind):
    if kind == "digits":
        data = open_data("digits")
    else:
        size = (16, 16) if kind == "small" else [(60, 44), (50, 70)]
        data = open_data(str(make_folder(tmp_path, size=size, suffix="jpg")), None if kind == "small" else 32)
    assert same(batches(data, 5, workers=0), batches(data, 5, workers=2))
    inside, outside = (list(validation_batches(data, 100, workers)) for workers in (0, 2))
    assert all(
        torch.equal(a, b) for left, right in zip(inside, outside, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_beginning_at_a_position_gives_the_batches_that_a_run_from_the_start_sees(folder):
    data = open_data(str(folder))
    assert same(batches(data, 3, position=16), batches(data, 7)[4:])


def test_seed_and_rank_change_order_and_augmentation(folder):
    data = open_data(str(folder))
    runs = [batches(data, 3, seed=seed, rank=rank) for seed in (0, 1) for rank in (0, 1)]
    assert not any(same(left, right) for left, right in itertools.combinations(runs, 2))


def test_batches_straddle_the_passes_and_know_their_position(folder):
    drawn = batches(open_data(str(folder)), 6, batch_size=5)
    assert [batch.position for batch in drawn] == [0, 5, 10, 15, 20, 25]
    assert all(batch.images.shape == (5, 3, 16, 16) and batch.labels.dtype == torch.int64 for batch in drawn)
    labels = torch.cat([batch.labels for batch in drawn])
    assert labels[:12].sum() == labels[12:24].sum() == 6  # each pass of 12 shows 6 dogs


def test_making_batches_leaves_the_training_thread_s_random_numbers_alone(folder):
    data = open_data(str(folder))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(data, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_shows_every_image_once_in_order_and_unchanged(folder):
    shown = list(validation_batches(open_data(str(folder)), 4, 0))
    assert [len(labels) for _, labels in shown] == [4, 2]
    assert torch.cat([labels for _, labels in shown]).tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(folder / "val" / "dog" / "2.png")) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(shown[1][0][1].permute(1, 2, 0), expected, atol=1e-5)


# Damaged files


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[: len(data) * 2 // 3], "empty": b"", "text": b"<html>"}[how])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated"),
        ("empty", "is not an image that Pillow can read"),
        ("text", "is not an image that Pillow can read"),
        ("missing", "No such file or directory"),
    ],
)
def test_an_unreadable_training_image_is_named_and_replaced_by_the_next(tmp_path, suffix, how, reason):
    folder = make_folder(tmp_path / "pets", suffix=suffix, size=(32, 32))
    data = open_data(str(folder))
    damage(folder / "train" / "cat" / f"5.{suffix}", how)
    (batch,) = batches(data, 1, batch_size=12)
    assert len(batch.skipped) == 1
    assert batch.skipped[0].startswith(f"train/cat/5.{suffix}: ")
    assert reason in batch.skipped[0]
    assert batch.labels.sum() == 7  # the first dog stands in for the last cat


def test_the_replacement_is_the_same_every_time(folder):
    data = open_data(str(folder))
    for index in (0, 1, 5):
        damage(folder / "train" / "dog" / f"{index}.png", "truncated")
    first, second = batches(data, 3, batch_size=12), batches(data, 3, batch_size=12)
    assert same(first, second)
    assert [batch.skipped for batch in first] == [batch.skipped for batch in second]
    assert len(set(first[0].skipped)) == 3


def test_an_unreadable_validation_image_is_left_out_and_named(folder):
    data = open_data(str(folder))
    for index in range(3):
        damage(folder / "val" / "cat" / f"{index}.png", "truncated")
    shown = validation_batches(data, 3, 0)
    assert [labels.tolist() for _, labels in shown] == [[1, 1, 1]]
    assert [name.split(":")[0] for name in shown.skipped] == [f"val/cat/{index}.png" for index in range(3)]


@pytest.mark.processes
@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_of_which_nothing_can_be_read_is_an_error(folder, workers):
    data = open_data(str(folder))
    for file in (*(folder / "train").glob("*/*"), *(folder / "val").glob("*/*")):
        damage(file, "truncated")
    with pytest.raises(DataError, match=r"^12 training images in a row cannot be read: .*train/.*and 9 more"):
        batches(data, 1, workers=workers)
    with pytest.raises(DataError, match=r"no validation image can be read: 'val/cat/0.png"):
        list(validation_batches(data, 4, workers))


def test_looking_for_a_readable_image_ends_after_a_hundred(folder, monkeypatch):
    monkeypatch.setattr(data_module, "GIVE_UP_AFTER", 2)
    data = open_data(str(folder))
    for index in range(6):
        damage(folder / "train" / "cat" / f"{index}.png", "text")
    with pytest.raises(DataError, match=r"2 training images in a row cannot be read"):
        batches(data, 1, batch_size=12)


@pytest.mark.parametrize(("split", "images"), [("train", 12), ("val", 6)])
def test_a_folder_of_unreadable_files_is_refused_when_it_is_opened(folder, split, images):
    for file in (folder / split).glob("*/*"):
        damage(file, "text")
    with pytest.raises(DataError, match=rf"{split}: none of {images} images looked at can be read"):
        open_data(str(folder))


# Real images


@pytest.mark.processes
@pytest.mark.timeout(100)
@pytest.mark.skipif(not (EXAMPLES / "tiny-imagenet-20.tar.xz").exists(), reason=f"no example data in {EXAMPLES}")
def test_a_real_archive_opens_and_gives_batches(tmp_path):
    data = open_data(str(EXAMPLES / "tiny-imagenet-20.tar.xz"), cache=tmp_path)
    assert (len(data.classes), len(data.train), len(data.val)) == (20, 10_000, 1_000)
    assert (data.image_size, data.channels, data.augmentation) == (64, 3, "shift and flip")
    drawn = batches(data, 20, batch_size=32, workers=1)
    assert abs(torch.cat([batch.images for batch in drawn]).mean()) < 0.5
    assert not any(batch.skipped for batch in drawn)
