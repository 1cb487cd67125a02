"""Frames of emulated links are long where the link is fast, and what a rank can send is told from their headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.lab.frames import frame_bytes, mtu_bytes, payload_share

MBIT = 125_000


@pytest.mark.parametrize(("mbit", "bytes_"), [(1, 1500), (5, 2250), (20, 9000), (1000, 9000)])
def test_frames_grow_with_the_link_from_ordinary_to_jumbo(mbit, bytes_):
    assert mtu_bytes(mbit * MBIT) == bytes_


@given(st.floats(125.0, 1.25e11))
def test_no_frame_takes_longer_than_an_ordinary_one_or_4_ms(bandwidth):
    assert frame_bytes(bandwidth) <= max(1514, 4e-3 * bandwidth)


@pytest.mark.parametrize(("mbit", "share"), [(1, 1448 / 1514), (20, 8948 / 9014)])
def test_of_a_full_frame_66_bytes_are_headers(mbit, share):
    assert payload_share(mbit * MBIT) == pytest.approx(share)
