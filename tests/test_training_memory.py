"""The memory of a training: what the formula says of its parts, real steps against it, and what fits a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import photon_config
from tiny_dense import dense_config

from photon_train import accounting
from photon_train.accounting import TrainingMemory, TrainingSetup, find_fit, training_memory
from photon_train.accounting.fit import USABLE
from photon_train.config import LoraSettings, RunConfig
from photon_train.conversion import presets
from photon_train.pipeline.prepare import estimate_training, training_setup
from photon_train.training import heads

ROOT = Path(__file__).resolve().parents[1]
SPECIFICATION = importlib.util.spec_from_file_location("measure_memory", ROOT / "tools" / "measure_memory.py")
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_SMALL = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 2, "vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HYBRIDS = {
    "convolutions": {"model_type": "lfm2", **_SMALL, "layer_types": ["conv", "conv", "full_attention"]},
    "delta nets": {
        "model_type": "qwen3_5_text",
        **_SMALL,
        "head_dim": 32,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 32,
    },
}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


def large_graft():
    """About 1.5 billion parameters."""
    dense = dense_config(num_hidden_layers=16, vocab_size=128256, head_dim=64, tie_word_embeddings=True, **LARGE)
    return presets.photon_config(dense, RunConfig())


@pytest.fixture(scope="module")
def tool():
    module = importlib.util.module_from_spec(SPECIFICATION)
    sys.modules[SPECIFICATION.name] = module  # dataclasses look their module up
    SPECIFICATION.loader.exec_module(module)
    return module


def test_the_peak_is_in_the_backward_pass_or_in_the_step():
    parts = {"weights": 100, "optimizer": 20, "buffers": 3, "host": 10**9}
    memory = TrainingMemory(**parts, gradients=50, activations=60, step=9, accumulates=False)
    assert memory.device == 123 + 60
    assert replace(memory, accumulates=True).device == 123 + 110
    assert replace(memory, step=90).device == 123 + 140


@pytest.mark.parametrize(("stage", "precision", "each"), [(1, "no", 12), (2, "no", 12), (3, "no", 8), (3, "bf16", 12)])
def test_what_the_optimiser_holds_of_a_trained_weight(stage, precision, each):
    """Two moments in fp32, and a master weight unless stage 3 trains in fp32 itself."""
    config = photon_config("memory")
    setup = TrainingSetup(64, precision=precision, weight_bytes=4, zero_stage=stage)
    assert training_memory(config, setup).optimizer == each * accounting.trainable_parameters(config, setup.rank)


# --- the formula against measurements ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True, "seq_len": 2048},
        {"distill": 1.0},
        {"distill_hidden": 1.0},
        {"weights": "bfloat16"},  # trained in fp32, as there is no mixed precision
        {"memory": "cells"},
        {"memory": "cells", "gradient_checkpointing": True, "seq_len": 2048},
        {"base_bits": 4, "seq_len": 64},
        {"base_bits": 4, "weights": "bfloat16", "gradient_checkpointing": True},
        {"base_bits": 4, "shape": "llama-2m", "seq_len": 32},
        {"shape": "experts"},
        {"shape": "experts", "seq_len": 256},
        *(
            {"shape": name, "memory": "cells", "seq_len": 512, "gradient_checkpointing": checkpointing}
            for name in HYBRIDS
            for checkpointing in (False, True)
        ),
    ],
)
def test_a_measured_step_takes_what_the_formula_says(tool, changes, tmp_path, monkeypatch):
    """In this process, through the real loop; within 15%."""
    if changes.get("base_bits"):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(
        tool.SHAPES,
        "tiny",
        {**tool.SHAPES["llama-2m"], "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3},
    )
    for name, shape in {"experts": EXPERTS, **HYBRIDS}.items():
        monkeypatch.setitem(tool.SHAPES, name, shape)
    if changes.get("shape") == "experts":  # which have no adapters by default
        run_config, targets = tool.run_config, ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
        monkeypatch.setattr(
            tool, "run_config", lambda point: replace(run_config(point), lora=LoraSettings(target_modules=targets))
        )
    row = tool.measure(tool.Point(**{"shape": "tiny", "zero_stage": 0, "seq_len": 1024, **changes}), tmp_path)
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15)


def test_the_published_points_are_within_the_promise(tool):
    """Of the committed measurement, computed anew with today's formula."""
    rows = json.loads((ROOT / "benchmarks" / "training" / "memory.json").read_text())["rows"]
    assert len({(row["shape"], row["zero_stage"], row["seq_len"]) for row in rows}) >= 6
    assert {row["zero_stage"] for row in rows} == {0, 2, 3}
    for row in map(tool.estimated_again, rows):
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15), row


def test_the_chunk_of_logits_is_the_loss_function_s():
    from photon_train.accounting.memory import LOGIT_CHUNK

    assert LOGIT_CHUNK == heads.CHUNK_ELEMENTS


# --- parts ---


def test_what_sharding_divides():
    config = photon_config("memory")
    setup = TrainingSetup(64, rank=4, num_processes=4)
    memory = {stage: training_memory(config, replace(setup, zero_stage=stage)) for stage in (0, 1, 2, 3)}
    trained = accounting.trainable_parameters(config, 4)
    dense = accounting.photon_parameters(config)
    shard = -(-trained // 4)
    whole = 2 * (dense + trained)
    assert [memory[stage].weights for stage in memory] == [2 * dense + 4 * trained, whole, whole, -(-whole // 8) * 2]
    assert [memory[stage].gradients for stage in memory] == [4 * trained, 2 * trained, 2 * shard, 2 * shard]
    # Plain AdamW keeps two moments in the adapters' fp32; ZeRO keeps them and master weights.
    assert [memory[stage].optimizer for stage in memory] == [8 * trained, 12 * shard, 12 * shard, 12 * shard]


def test_offloading_moves_bytes_to_main_memory():
    config = photon_config("memory")
    for stage in (2, 3):
        kept = training_memory(config, TrainingSetup(64, zero_stage=stage, num_processes=2))
        away = training_memory(config, TrainingSetup(64, zero_stage=stage, num_processes=2, offload=True))
        assert away.optimizer == 0 and away.device < kept.device and away.host > kept.optimizer
        assert (away.weights == 0) == (stage == 3)


def test_a_base_in_4_bits_takes_a_quarter_of_16_and_is_not_divided():
    config, setup = large_graft(), TrainingSetup(2048, zero_stage=2, num_processes=2)
    whole, rounded = (training_memory(config, replace(setup, base_bits=bits)) for bits in (16, 4))
    linears = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192)
    # A code of half a byte, a byte per 64 weights and a float per 64 * 256.
    assert whole.weights - rounded.weights == int(linears * (2 - 0.5 - 1 / 64 - 1 / 4096))
    fit = find_fit(config, replace(setup, base_bits=4), 2**31)
    assert {option.config for option in fit.options} == {"zero2"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_grow_linearly_with_the_text(checkpointing):
    config = large_graft()
    bytes_at = {
        tokens: accounting.activation_bytes(config, TrainingSetup(tokens, gradient_checkpointing=checkpointing))
        for tokens in (2**15, 2**16, 2**17)
    }
    first, second = (bytes_at[2 * tokens] - bytes_at[tokens] for tokens in (2**15, 2**16))
    assert second == pytest.approx(2 * first, rel=1e-3)


def test_checkpointing_keeps_less():
    config = large_graft()
    full, less = (
        accounting.activation_bytes(config, TrainingSetup(4096, gradient_checkpointing=on)) for on in (False, True)
    )
    assert less < full / 4


@pytest.mark.parametrize("wrong", [{"zero_stage": 4}, {"precision": "fp8"}])
def test_unknown_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingSetup(64, **wrong)


# --- what fits ---


@pytest.mark.parametrize(
    ("gib", "setup", "config", "arguments"),
    [
        (80, TrainingSetup(4096, 4), "single_gpu", ""),
        (24, TrainingSetup(4096, 4), "single_gpu", " --train.gradient_checkpointing"),
        (24, TrainingSetup(4096, 2, num_processes=8), "zero2", " --num_processes 8"),
        (7, TrainingSetup(4096, 4), "single_gpu", " --train.gradient_checkpointing --train.batch_size 2"),
        (3, TrainingSetup(4096, 1), "zero3_offload", " --num_processes 1 --train.gradient_checkpointing"),
        (6, TrainingSetup(4096, rank=0, num_processes=8), "zero3", " --num_processes 8 --train.gradient_checkpointing"),
    ],
)
def test_the_fastest_way_that_fits_is_recommended(gib, setup, config, arguments):
    fit = find_fit(large_graft(), setup, gib * 2**30)
    assert fit.recommended.command(setup) == f"--config_file accelerate_configs/{config}.yaml{arguments}"
    assert fit.recommended.device_bytes <= USABLE * gib * 2**30
    assert (ROOT / "accelerate_configs" / f"{fit.recommended.config}.yaml").is_file()
    assert {option.fits for option in fit.options} <= {True, False}


def test_more_gpus_are_recommended_where_one_is_too_small_and_nothing_where_none_helps():
    setup = TrainingSetup(4096, rank=0)
    fit = find_fit(large_graft(), setup, 12 * 2**30)
    assert fit.recommended.command(setup).startswith("--config_file accelerate_configs/zero3")
    assert find_fit(large_graft(), setup, 2**28).to_dict()["recommended"] is None


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("512MiB", 2**29)])
def test_the_gpu_is_a_setting(text, size):
    config = RunConfig()
    config.train.gpu_memory = text
    photon = photon_config("memory")
    assert estimate_training(accounting.costs_of(photon).dense, photon, config, 1).fit.gpu_bytes == size


def test_the_launch_tells_stage_and_offloading(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    setup = training_setup(RunConfig(), 4, 2, "bf16")
    assert (setup.zero_stage, setup.offload, setup.num_processes) == (3, True, 4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_without_mixed_precision_16_bit_checkpoints_count_as_fp32(stage):
    config = large_graft()
    setups = [TrainingSetup(1024, weight_bytes=size, precision="no", zero_stage=stage) for size in (2, 4)]
    assert len({training_memory(config, setup) for setup in setups}) == 1
