"""The quality study's columns on models whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib.copying import copy_gain
from lib.quality import measure_quality, periodic
from lib.repeats import Repeats
from lib.study import add_recovered, markdown_table
from photon_train.data.packing import PackedDataset
from photon_train.errors import PhotonError

VOCABULARY = 50


def text(sequences: int = 8, length: int = 1024) -> PackedDataset:
    tokens = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0)).int()
    return PackedDataset(tokens, torch.zeros(sequences, length, dtype=torch.bool), sequences)


class Copier(nn.Module):
    """Predicts what followed the last occurrence of the last three tokens within `reach` tokens; else knows nothing."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.unused = reach, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            last: dict[tuple[int, ...], int] = {}
            for i in range(2, len(tokens)):
                triple = tuple(tokens[i - 2 : i + 1])
                if triple in last and i - last[triple] <= self.reach:
                    logits[row, i, tokens[last[triple] + 1]] = 12.0
                last[triple] = i
        return SimpleNamespace(logits=logits)


def test_a_copier_gains_what_it_reaches_and_no_more() -> None:
    model = Copier(reach=450)
    gains = copy_gain(lambda rows: model(rows).logits, text(), count=12)
    # 13 of 16 tokens follow three known ones.
    assert gains[300] > 0.9 * 13 / 16 * math.log(VOCABULARY) and gains[400] > 0.9 * 13 / 16 * math.log(VOCABULARY)
    assert abs(gains[500]) < 0.1 and abs(gains[600]) < 0.1


def test_the_same_seed_asks_the_same() -> None:
    seen: list[torch.Tensor] = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.clone())
        return torch.zeros(*rows.shape, VOCABULARY)

    for seed in (3, 3, 4):
        copy_gain(logits, text(), distances=(300,), count=4, seed=seed)
    control, repeated = seen[0], seen[1]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[1], seen[5])
    assert torch.equal(control[:, -16:], repeated[:, -16:]) and torch.equal(repeated[:, 32:48], repeated[:, -16:])
    assert not torch.equal(control[:, 32:48], repeated[:, 32:48])


def test_a_probe_longer_than_the_text_is_refused() -> None:
    with pytest.raises(PhotonError, match="too few for a distance of 600"):
        copy_gain(lambda rows: rows, text(1, 1000))


def test_quality_of_models_with_a_long_and_a_short_reach() -> None:
    near, far = (measure_quality(Copier(reach), text(4), beyond=256, sequences=4) for reach in (100, 1000))
    blind = math.log(VOCABULARY)
    assert near.ce_repeated > 0.8 * blind and far.ce_repeated < 0.3 * blind
    assert far.copy_gain > 2.0 > 0.1 > near.copy_gain
    assert near.ce == pytest.approx(near.ce_beyond_window, abs=0.3)


def test_short_sequences_are_refused() -> None:
    with pytest.raises(PhotonError, match="at least 960"):
        measure_quality(Copier(10), text(4, 512), beyond=256)


def test_periodic_text_repeats_with_the_stated_periods() -> None:
    rows, periods = periodic(text().tokens.long(), seed=1)
    for row, period in zip(rows, periods.tolist(), strict=True):
        assert 150 <= period <= 480 and torch.equal(row[period:], row[:-period])


def test_repeats_are_the_same_for_the_same_index_and_keep_their_shares() -> None:
    dataset = text(400, 128)
    changed = Repeats(dataset, periodic=0.3, spans=0.2, seed=5)
    everything = changed.batch(torch.arange(400))
    assert torch.equal(changed.batch(torch.tensor([17, 3]))["input_ids"], everything["input_ids"][[17, 3]])
    assert torch.equal(everything["labels"], everything["input_ids"])
    plain = (everything["input_ids"] == dataset.tokens.long()).all(1)
    period = torch.tensor([any(torch.equal(r[p:], r[:-p]) for p in range(16, 65)) for r in everything["input_ids"]])
    assert plain.float().mean() == pytest.approx(0.5, abs=0.08) and period.float().mean() == pytest.approx(
        0.3, abs=0.08
    )
    assert torch.equal(dataset.batch(torch.arange(400))["input_ids"], dataset.tokens.long())


def row(plan: str, ce: float, tokens: int, seed: int = 0) -> dict:
    columns = ("kv_growing_percent", "kv_constant_bytes", "layer_positions", "flops_per_token", "parameters")
    numbers = dict.fromkeys((*columns, "parameters_trainable", "seconds", "ce", "copy_gain"), 1.0)
    return {**numbers, "plan": plan, "name": plan, "tokens": tokens, "seed": seed} | {
        "ce_beyond_window": ce,
        "ce_repeated": 2 * ce,
    }


def test_recovered_share_uses_rows_trained_alike() -> None:
    rows = [row("dense", 3.0, 0), row("dense-window", 3.4, 0), row("dense-finetuned", 2.9, 10)]
    rows += [
        {**row("dense-finetuned", 2.5, 10), "name": "dense, every weight"},
        row("dense-window", 3.2, 10),
        row("dense-window", 3.4, 10, seed=1),
        row("graft", 3.0, 10),
        row("graft", 3.1, 0),
    ]
    add_recovered(rows)
    assert rows[-2]["recovered"] == pytest.approx((3.3 - 3.0) / (3.3 - 2.9))
    assert rows[-1]["recovered"] == pytest.approx(0.75) == rows[-1]["recovered_repeated"]
    assert rows[2]["recovered"] == pytest.approx(1.0)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + 7 and any("3.3000 ± 0.1000" in line for line in lines)
    wide = [{**row("dense-window", 3.1, 10), "window": 130}, {**row("graft", 3.0, 10), "window": 128}]
    narrow = [{**each, "window": 64} for each in rows]
    add_recovered([*narrow, *wide])
    assert narrow[-2]["recovered"] == pytest.approx((3.3 - 3.0) / (3.3 - 2.9))
    assert wide[1]["recovered"] == pytest.approx((3.1 - 3.0) / (3.1 - 2.9))
    add_recovered([*narrow, wide[1]])
    assert wide[1]["recovered"] is None
    alone = [row("graft", 3.0, 10)]
    add_recovered(alone)
    assert alone[0]["recovered"] is None and markdown_table(alone)
