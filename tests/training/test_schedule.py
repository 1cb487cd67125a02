"""The learning rate over the run."""

from __future__ import annotations

import pytest

from lasgd.training.schedule import factor


def test_the_warm_up_rises_in_proportion_and_never_from_zero():
    assert factor(0.0, 0.1) == 0.01
    assert factor(0.05, 0.1) == pytest.approx(0.5)
    assert factor(0.1, 0.1) == 1.0


def test_the_cosine_falls_from_the_peak_to_zero_with_half_in_the_middle():
    assert factor(0.0, 0.0) == 1.0
    assert factor(0.55, 0.1) == pytest.approx(0.5)
    assert factor(1.0, 0.1) == pytest.approx(0.0, abs=1e-12)
    falling = [factor(0.1 + 0.09 * i, 0.1) for i in range(11)]
    assert falling == sorted(falling, reverse=True)
