"""Scales from norms: positions with outlying norms decide nothing."""

from __future__ import annotations

import pytest
import torch

from photon_train.conversion.scales import median_ratio
from photon_train.errors import PhotonError


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e6])
def test_one_position_with_a_huge_norm_changes_no_scale(outlier):
    """The first token of a text, in a trained model; here one of 64 positions, in either list."""
    wanted, actual = torch.full((64,), 3.0), torch.full((64,), 2.0)
    wanted[0] *= outlier
    assert median_ratio([wanted], [actual], "a test") == pytest.approx(1.5)
    actual[5] *= outlier**2
    assert median_ratio([wanted], [actual], "a test") == pytest.approx(1.5)


def test_all_batches_count_by_their_positions():
    """Nine norms of 1 in two batches and two of 8: the median of all, not of the batches' medians."""
    wanted = [torch.ones(1), torch.full((2,), 8.0), torch.ones(8)]
    assert median_ratio(wanted, [torch.ones(3)], "a test") == 1
    assert median_ratio([torch.ones(3)], [torch.full((7,), 4.0), torch.ones(2)], "a test") == 0.25


@pytest.mark.parametrize(("wanted", "actual"), [(0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_norms_that_give_no_scale_are_refused(wanted, actual):
    with pytest.raises(PhotonError, match="calibration of level 2: median norms"):
        median_ratio([torch.full((3,), wanted)], [torch.full((3,), actual)], "level 2")
