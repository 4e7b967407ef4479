"""Mixtures: the proportions asked for, in any beginning, and every sequence of every source."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon_train.data.loader import batches
from photon_train.data.mixture import Mixture
from photon_train.data.packing import PackedDataset
from photon_train.errors import PhotonError


def numbered(source: int, count: int, filled: float = 1.0) -> PackedDataset:
    """Sequence i of source s holds s and i in turn."""
    tokens = torch.tensor([[source, i, source, i] for i in range(count)], dtype=torch.int32)
    filler = torch.zeros_like(tokens, dtype=torch.bool)
    filler[:, round(4 * filled) :] = True
    return PackedDataset(tokens, filler, count)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    data=st.data(),
)
def test_every_beginning_has_the_proportions_and_nothing_is_lost(sizes: list[int], data) -> None:
    weights = [data.draw(st.floats(0.1, 5.0)) for _ in sizes]
    mixture = Mixture([numbered(s, n) for s, n in enumerate(sizes)], weights)
    rows = mixture.batch(torch.arange(len(mixture)))["input_ids"]
    seen = set(map(tuple, rows[:, :2].tolist()))
    assert seen == {(s, i) for s, n in enumerate(sizes) for i in range(n)}
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        counts = (rows[:, 0] == source).cumsum(0)
        target = share * torch.arange(1, len(rows) + 1)
        assert (counts - target).abs().max() <= 1 + len(sizes)


def test_proportions_of_the_sizes_read_everything_once() -> None:
    """However their shares are rounded: 0.3 / 0.4 of 4 is not 3."""
    mixture = Mixture([numbered(0, 1), numbered(1, 3)], [0.1, 0.3])
    assert len(mixture) == 4 and (mixture.source == 1).sum() == 3


def test_a_mixture_goes_through_the_loader() -> None:
    mixture = Mixture([numbered(0, 10), numbered(1, 40, filled=0.5)], [3.0, 1.0])
    assert len(mixture) == 160 and mixture.packing_efficiency == pytest.approx(0.875)
    assert (mixture.num_documents, mixture.num_tokens) == (50, 10 * 4 + 40 * 2)
    ((batch,),) = [next(batches(mixture, 0, 16))]
    assert batch["input_ids"].shape == (16, 4)
    assert batch["labels"][batch["input_ids"][:, 0] == 1][:, 2:].eq(-100).all()
    again = next(batches(mixture, 0, 16, start_step=0))[0]
    assert torch.equal(again["input_ids"], batch["input_ids"])


def test_proportions_that_need_too_much_are_refused() -> None:
    with pytest.raises(PhotonError, match="dataset.sources: .*give a large source more weight"):
        Mixture([numbered(0, 2), numbered(1, 100)], [1.0, 1e-7])


def test_the_hash_is_of_the_sequences_and_their_order() -> None:
    hashes = {
        mixture.content_hash()
        for mixture in (
            Mixture([numbered(0, 3), numbered(1, 4)], [1, 1]),
            Mixture([numbered(0, 3), numbered(1, 4)], [1, 5]),
            Mixture([numbered(0, 3), numbered(2, 4)], [1, 1]),
            Mixture([numbered(0, 3), numbered(1, 4, filled=0.5)], [1, 1]),
        )
    }
    assert len(hashes) == 4
    assert Mixture([numbered(0, 3), numbered(1, 4)], [1, 1]).content_hash() in hashes
