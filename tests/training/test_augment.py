import numpy as np
import pytest
import torch

from lasgd.training.augment import augmenter, drawing_from, normalised, stacked

KINDS = ["shift", "shift and flip", "crop and flip"]


def pictures(count: int, side: int, channels: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 256, (side, side, channels), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(kind):
    def draw(seed: int) -> torch.Tensor:
        with drawing_from(seed):
            return augmenter(kind, 16)(pictures(8, 16))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_thread_s_random_numbers_are_left_alone(kind):
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    with drawing_from(99):
        augmenter(kind, 16)(pictures(2, 16))
    assert torch.equal(torch.rand(3), undisturbed)


def test_a_failure_inside_gives_the_generator_back_too():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), drawing_from(1):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "flips"), [("shift", {False}), ("shift and flip", {False, True})])
def test_a_shifted_image_is_a_window_of_the_zero_padded_one(kind, flips):
    images = pictures(64, 8, 1)
    with drawing_from(3):
        result = augmenter(kind, 8)(images)
    assert result.shape == (64, 1, 8, 8)
    assert result.dtype == torch.float32
    seen = set()
    for image, found in zip(images, result.numpy(), strict=True):
        padded = np.pad(image[:, :, 0], 1)
        windows = {
            (top, left, flip): padded[top : top + 8, left : left + 8][:, :: -1 if flip else 1]
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
        }
        (match,) = [key for key, window in windows.items() if np.array_equal(window, found[0])]
        seen.add(match)
    assert {flip for _, _, flip in seen} == flips
    assert {(top, left) for top, left, _ in seen} == {(top, left) for top in range(3) for left in range(3)}


def test_images_of_different_shapes_become_parts_of_one_size():
    images = [np.full((height, width, 3), 200, np.uint8) for height, width in ((50, 70), (90, 40), (64, 64))]
    with drawing_from(0):
        result = augmenter("crop and flip", 32)(images)
    assert result.shape == (3, 3, 32, 32)
    assert torch.allclose(result, torch.full_like(result, 200), atol=1e-3)  # a part of a plain image is plain; fp32


def test_stacking_keeps_every_pixel_and_makes_a_contiguous_copy():
    images = pictures(3, 5)
    batch = stacked(images)
    assert batch.is_contiguous()
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), np.stack(images))


def test_normalising_takes_each_channel_s_own_constants():
    batch = torch.stack([torch.full((2, 2), 10.0), torch.full((2, 2), 20.0)])[None]
    assert normalised(batch, (8.0, 20.0), (2.0, 5.0))[0, :, 0, 0].tolist() == [1.0, 0.0]
