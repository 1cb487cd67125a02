"""Wire formats round as they say, and what they round off is not lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasgd.errors import ConfigurationError
from lasgd.wire import BLOCK, CodedMean, piece_bytes, wire

FORMATS = ("bf16", "int8")
SIZES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 5000)


def randn(size: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> Tensor:
    return scale * torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def of_all(coded: list[CodedMean], values: list[Tensor], weights: list[float], begin: int = 0) -> list[Tensor]:
    """One round, the bytes handed on in memory; what counted is left in `values`."""
    sent = [c.outgoing(v, w, begin) for c, v, w in zip(coded, values, weights, strict=True)]
    codes = [pieces.clone() for pieces, _ in sent]
    everything = torch.zeros_like(codes[0])
    for k, c in enumerate(coded):
        received = torch.stack([pieces[k] for pieces in codes])
        everything[k] = c.reduce(values[k], received, sum(weights))
    return [c.finish(v, w, begin, everything).clone() for c, v, w in zip(coded, values, weights, strict=True)]


def parts(name: str, ranks: int, size: int, dtype=torch.float32) -> list[CodedMean]:
    found = wire(name)
    assert found is not None
    return [CodedMean(found, k, ranks, torch.zeros(size, dtype=dtype)) for k in range(ranks)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_decoded_is_what_encoding_has_left_behind(name, size, dtype):
    found = wire(name)
    assert found is not None
    values = randn(size, dtype=dtype)
    codes = torch.zeros(piece_bytes(found, size, 1), dtype=torch.uint8)
    rounded = values.clone()
    found.encode(rounded, codes)
    out = torch.full_like(values, 7.0)
    found.decode(codes, out)
    assert torch.equal(out, rounded)
    assert (rounded - values).abs().max() > 0 or size < 3


def test_bf16_keeps_eight_bits():
    found, values = wire("bf16"), randn(1000)
    assert found is not None
    rounded = values.clone()
    found.encode(rounded, torch.zeros(found.n_bytes(1024), dtype=torch.uint8))
    assert ((rounded - values).abs() <= values.abs() / 256).all()


def test_int8_is_off_by_half_a_unit_of_the_blocks_largest():
    found, values = wire("int8"), randn(4 * BLOCK)
    values[BLOCK : 2 * BLOCK] *= 1e-6  # small numbers keep their precision beside large ones
    assert found is not None
    rounded = values.clone()
    found.encode(rounded, torch.zeros(found.n_bytes(4 * BLOCK), dtype=torch.uint8))
    unit = values.view(4, BLOCK).abs().amax(1, keepdim=True) / 127
    assert ((rounded - values).view(4, BLOCK).abs() <= 0.5001 * unit).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_the_smallest_numbers_stay_finite(name):
    found = wire(name)
    assert found is not None
    for value in (0.0, 1e-45, 1e-40, 1.2e-38):
        values = torch.full((BLOCK,), value)
        found.encode(values, torch.zeros(found.n_bytes(BLOCK), dtype=torch.uint8))
        assert torch.isfinite(values).all()
        assert (values - value).abs().max() <= 1.2e-38


def test_int8_is_a_quarter_of_the_bytes():
    found = wire("int8")
    assert found is not None
    assert piece_bytes(found, 400_000, 4) * 4 / (4 * 400_000) < 0.26


def test_an_unknown_format_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match="int8"):
        wire("int9")


@pytest.mark.parametrize("name", FORMATS)
@given(
    ranks=st.integers(1, 5),
    size=st.integers(1, 1500),
    seed=st.integers(0, 10_000),
    weights=st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_what_has_counted_sums_up_to_the_mean(name, ranks, size, seed, weights):
    """So nothing is created or destroyed by rounding: sum_j w_j (m - counted_j) = 0."""
    weights = weights[:ranks]
    dtype = torch.float64
    sent = [randn(size, seed + k, dtype=dtype) for k in range(ranks)]
    values = [v.clone() for v in sent]
    means = of_all(parts(name, ranks, size, dtype), values, weights)
    assert all(torch.equal(mean, means[0]) for mean in means)
    of_all_counted = sum(w * v for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(of_all_counted, sum(weights) * means[0], rtol=0, atol=1e-12)
    true = sum(w * v for w, v in zip(weights, sent, strict=True)) / sum(weights)
    largest = max(v.abs().max().item() for v in sent)
    torch.testing.assert_close(means[0], true, rtol=0, atol=2 * ranks * 3 * largest / 64)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_errors_are_in_the_next_contributions_and_the_mean_over_rounds_is_exact(name):
    """Ranks that take no local steps: each round the differences that are left are rounded anew, and shrink."""
    ranks, size = 4, 3000
    starts = [randn(size, k, dtype=torch.float64) for k in range(ranks)]
    true, z, coded = sum(starts) / ranks, [start.clone() for start in starts], parts(name, ranks, size, torch.float64)
    errors = []
    for _ in range(8):
        counted = [v.clone() for v in z]
        mean = of_all(coded, counted, [1.0] * ranks)[0]
        for own, what in zip(z, counted, strict=True):
            own.add_(mean - what)  # the correction, of a replica that has taken no step
        torch.testing.assert_close(sum(z) / ranks, true, rtol=0, atol=1e-14)
        errors.append(max((own - true).abs().max().item() for own in z))
    assert errors[0] > 1e-4  # the first mean is coarse
    assert errors[-1] < 1e-12
    assert all(after < before / 20 or after < 1e-12 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("name", FORMATS)
def test_fragments_of_different_sizes_take_turns_in_the_same_room(name):
    ranks, cuts = 3, (0, 700, 2500, 2600)
    coded, true = parts(name, ranks, cuts[-1]), [randn(cuts[-1], k) for k in range(ranks)]
    for _ in range(6):
        for begin, end in itertools.pairwise(cuts):
            values = [v[begin:end].clone() for v in true]
            mean = of_all(coded, values, [1.0] * ranks, begin)[0]
    torch.testing.assert_close(mean, (sum(true) / ranks)[cuts[-2] :], rtol=0, atol=2e-2)
    assert all(torch.equal(c.latest, coded[0].latest) for c in coded)


def test_a_rank_without_weight_says_nothing_and_hears_the_same():
    coded = parts("int8", 3, 600)
    values = [torch.zeros(600), randn(600, 1), randn(600, 2)]
    means = of_all(coded, values, [0.0, 1.0, 1.0])
    assert all(torch.equal(mean, means[0]) for mean in means)
    torch.testing.assert_close(means[0], (randn(600, 1) + randn(600, 2)) / 2, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reducing_works_in_the_values_own_piece_and_leaves_them_as_they_were(name, dtype):
    ranks, size = 2, 5 * BLOCK + 3
    coded = parts(name, ranks, size, dtype)
    values = [randn(size, seed=k, dtype=dtype) for k in range(ranks)]
    codes = [c.outgoing(v, 1.0, 0)[0].clone() for c, v in zip(coded, values, strict=True)]
    said = [v.clone() for v in values]
    for k, c in enumerate(coded):
        c.reduce(values[k], torch.stack([pieces[k] for pieces in codes]), float(ranks))
    assert all(torch.equal(a, b) for a, b in zip(values, said, strict=True))
