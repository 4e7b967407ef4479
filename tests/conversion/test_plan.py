"""The plan: complete, checked, readable, and the same after a round trip through JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_dense import dense_config

from photon_train.config import PRESETS, PhotonSettings, RunConfig
from photon_train.conversion.operators import OPERATORS
from photon_train.conversion.plan import ConversionPlan, Dropped
from photon_train.conversion.presets import make_plan, photon_config, target_of, target_tensors
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError


def plan_for(checkpoint: DenseCheckpoint, preset: str = "graft", **settings):
    config = photon_config(checkpoint.config, RunConfig(preset=preset, **settings))
    return make_plan(checkpoint, config), config


def checkpoint_like(config, **extra) -> DenseCheckpoint:
    """A checkpoint of which only names and shapes exist."""
    from photon_train.conversion.families import dense_tensors

    shapes = {**dense_tensors(config), **extra}
    return DenseCheckpoint(None, config, {name: TensorInfo(s, torch.bfloat16, None) for name, s in shapes.items()})


@pytest.fixture(scope="module")
def case():
    checkpoint = checkpoint_like(dense_config())
    plan, config = plan_for(checkpoint)
    return plan, target_tensors(config), {name: info.shape for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_complete_plan(preset, model_type):
    plan, _ = plan_for(checkpoint_like(dense_config(model_type)), preset)
    assert (plan.preset, plan.family, plan.dtype) == (preset, model_type, "bfloat16")
    assert plan.preserves_dense == (preset == "graft")
    assert not plan.dropped


def test_what_is_dropped_has_a_reason():
    config = dense_config(tie_word_embeddings=True)
    extra = {"lm_head.weight": (64, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    plan, _ = plan_for(checkpoint_like(config, **extra))
    assert {entry.source: entry.reason for entry in plan.dropped} == {
        "lm_head.weight": "the head shares the embedding's weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "computed from the configuration",
    }


def test_a_source_that_no_rule_knows_is_an_error():
    with pytest.raises(PhotonError, match="model.extra.weight .1 such tensors. is no part of a llama language model"):
        plan_for(checkpoint_like(dense_config(), **{"model.extra.weight": (3,)}))


def test_the_graft_keeps_every_dense_tensor_under_its_own_name(case):
    plan, _, sources = case
    assert {entry.target: entry.sources for entry in plan.tensors if entry.sources} == {n: (n,) for n in sources}
    assert all(entry.operator == "copy" for entry in plan.tensors if entry.sources)
    new = {entry.target for entry in plan.tensors if not entry.sources}
    assert new and all(name.startswith("model.layers.3.self_attn.memory.") for name in new)


def test_the_check_finds_every_kind_of_hole(case):
    plan, targets, sources = case
    first, last = plan.tensors[0], next(entry for entry in reversed(plan.tensors) if entry.sources)
    others = tuple(entry for entry in plan.tensors if entry is not last)

    def fails(message: str, **changes) -> None:
        with pytest.raises(PhotonError, match=message):
            replace(plan, **changes).check(targets, sources)

    plan.check(targets, sources)
    fails(f"{first.target} is written twice", tensors=(*plan.tensors, first))
    fails(f"target {first.target} is not written", tensors=plan.tensors[1:])
    fails("target unknown is not a tensor", tensors=(*plan.tensors, replace(first, target="unknown")))
    fails(f"{first.target} has shape", tensors=(replace(first, shape=(1, 1)), *plan.tensors[1:]))
    fails("unknown operator 'divide'", tensors=(replace(first, operator="divide"), *plan.tensors[1:]))
    fails("cannot take 2 sources", tensors=(replace(first, sources=first.sources * 2), *plan.tensors[1:]))
    fails("reads nothing, which", tensors=(replace(first, sources=("nothing",)), *plan.tensors[1:]))
    fails("its source model.norm.weight", tensors=(replace(first, sources=("model.norm.weight",)), *plan.tensors[1:]))
    fails(
        f"source {last.sources[0]} is neither used nor dropped",
        tensors=(*others, replace(last, operator="constant", sources=(), arguments={"value": 0})),
    )
    fails("is dropped, but used", dropped=(Dropped(first.sources[0], "why"),))
    fails("is dropped, but the checkpoint lacks it", dropped=(Dropped("nothing", "why"),))


def test_json_round_trip(case):
    plan = case[0]
    assert ConversionPlan.from_json(plan.to_json()) == plan
    for text in ("{", "[]", '{"preset": 1}'):
        with pytest.raises(PhotonError, match="not a conversion plan"):
            ConversionPlan.from_json(text)


def test_the_table_of_eighty_layers_fits_a_screen():
    photon = PhotonSettings(memory_cells=[f"{layer}:0" for layer in range(43, 80, 4)])
    plan, _ = plan_for(checkpoint_like(dense_config(num_hidden_layers=80)), photon=photon)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(plan.table())
    lines = console.export_text().splitlines()
    assert len(lines) < 30
    assert any("0-79" in line and "copy" in line for line in lines)
    assert any("43, 47 ... 79" in line and "mean_chunk" in line for line in lines)


def test_a_stacked_source_is_used_whole_or_not_at_all():
    checkpoint = checkpoint_like(dense_config("phi3"))
    plan, config = plan_for(checkpoint)
    targets, sources = target_tensors(config), {name: info.shape for name, info in checkpoint.tensors.items()}
    part = next(entry for entry in plan.tensors if entry.operator == "split" and entry.arguments["row"])

    def fails(message: str, row: int) -> None:
        moved = replace(part, arguments={"row": row})
        with pytest.raises(PhotonError, match=message):
            replace(plan, tensors=tuple(moved if e is part else e for e in plan.tensors)).check(targets, sources)

    fails(f"{part.shape[0]} of the 64 rows of source {part.sources[0]} are not used", 0)
    fails("begins at row 60", 60)


@pytest.mark.parametrize("piece", [1, 5, 7, 100])
def test_split_takes_rows_wherever_the_pieces_end(piece):
    stacked = torch.arange(9 * 3).view(9, 3)
    for row, count in ((0, 2), (2, 4), (6, 3)):
        parts = OPERATORS["split"]((count, 3), {"row": row}, [iter(stacked.flatten().split(piece))])
        assert torch.equal(torch.cat(list(parts)).view(count, 3), stacked[row : row + count])


def run_operator(name: str, shape, **arguments):
    return torch.cat(list(OPERATORS[name](shape, arguments, ()))).view(shape)


@pytest.mark.parametrize(("preset", "count"), [("graft", 4), ("paper", 11)])
def test_operators_make_what_an_untrained_model_starts_with(preset, count, monkeypatch):
    import photon_train.conversion.operators as operators

    plan, config = plan_for(checkpoint_like(dense_config()), preset)
    torch.manual_seed(0)
    fresh = target_of(config).model(config).state_dict()
    monkeypatch.setattr(operators, "PIECE_BYTES", 4 * 1000)  # several pieces per tensor
    made = 0
    for entry in plan.tensors:
        if not entry.sources:
            made += 1
            value = run_operator(entry.operator, entry.shape, **entry.arguments)
            torch.testing.assert_close(value, fresh[entry.target], msg=entry.target)
    assert made == count
