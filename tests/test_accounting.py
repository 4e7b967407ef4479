"""The closed formulas against counted parameters, measured caches and counted work."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny import GRAFTS, photon_config, photon_model, tokens
from tiny_dense import FAMILY_NAMES, dense_config
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from photon_train import accounting
from photon_train.config import PRESETS, PhotonSettings, RunConfig
from photon_train.conversion import presets
from photon_train.linears import LINEARS
from photon_train.training.lora import add_lora

FAMILIES = [
    *((name, {}) for name in FAMILY_NAMES),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
]


def counted(model: torch.nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def on_meta(config):
    with torch.device("meta"):
        return presets.target_of(config).model(config)


def converted(dense, preset: str = "graft", **photon):
    return presets.photon_config(dense, RunConfig(preset=preset, photon=PhotonSettings(**photon)))


# --- parameters ---


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES)
def test_parameters_of_every_family(model_type, changes):
    dense = dense_config(model_type, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense)
    assert accounting.dense_parameters(dense) == accounting.dense_parameters(dense.to_dict()) == counted(model)
    assert accounting.photon_parameters(converted(dense)) == counted(on_meta(converted(dense)))


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_every_preset(preset):
    config = converted(dense_config(num_hidden_layers=8), preset)
    assert accounting.photon_parameters(config) == counted(on_meta(config))


@pytest.mark.parametrize("name", GRAFTS)
def test_parameters_of_every_graft(name):
    config = photon_config(name)
    model = on_meta(config)
    assert accounting.photon_parameters(config) == counted(model)
    new = sum(counted(model.get_submodule(module)) for module in model.new_module_names())
    assert accounting.new_parameters(config) == new
    assert (new > 0) == ("memory" in name)


@pytest.mark.parametrize("target_modules", [["q_proj", "up_proj"], list(LINEARS), ["v_proj", "lm_head"]])
@pytest.mark.parametrize(("preset", "family"), [*((preset, "llama") for preset in PRESETS), ("graft", "glm4")])
def test_what_lora_trains(target_modules, preset, family):
    """GLM-4 holds two linear maps as one, which gets one adapter."""
    settings = RunConfig().lora
    settings.rank, settings.target_modules = 3, target_modules
    config = converted(dense_config(family), preset)
    model = add_lora(presets.target_of(config).model(config), settings)
    assert accounting.trainable_parameters(config, 3, target_modules) == counted(model, trainable=True)
    assert accounting.trainable_parameters(config, 0) == accounting.photon_parameters(config)
    # What `training_memory` counts as held: the originals of the new modules stay beside their copies.
    setup = accounting.TrainingSetup(1, 1, 3, tuple(target_modules), weight_bytes=4, precision="no")
    assert accounting.training_memory(config, setup).weights == 4 * counted(model)


# --- caches ---


def held(cache) -> dict[str, int]:
    """What the cache itself says, `buffers` of open chunks among what is constant."""
    found = cache.kv_bytes()
    return {"growing": found["growing"], "constant": found["constant"] + found.get("buffers", 0)}


def expected(config, length: int) -> dict[str, int]:
    found = accounting.cache_bytes(config, length, 4)
    return {"growing": found.growing, "constant": found.constant}


@pytest.mark.parametrize("length", [1, 11, 40])
@pytest.mark.parametrize("name", GRAFTS)
def test_cache_bytes_are_those_of_the_cache(name, length):
    model = photon_model(name)
    cache = model(tokens(1, length), use_cache=True).past_key_values
    assert held(cache) == expected(model.config, length)
    # Three equal rows hold three times as much.
    rows = model(tokens(1, length).expand(3, -1), use_cache=True).past_key_values
    assert held(rows) == {key: 3 * value for key, value in held(cache).items()}


@pytest.mark.parametrize("name", GRAFTS)
def test_cache_bytes_hold_after_decoding(name):
    model = photon_model(name)
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    for step in range(5, 38):
        model(tokens(1, 1, seed=step), past_key_values=cache)
        assert held(cache) == expected(model.config, step + 1)


def test_layers_that_the_family_keeps_local_hold_their_own_window():
    local = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = photon_model("memory", "qwen2", memory_cells={0: [0, 1]}, **local)
    assert [model.config.is_local(layer) for layer in range(3)] == [False, True, True]
    cache = model(tokens(1, 40), use_cache=True).past_key_values
    assert held(cache) == expected(model.config, 40)
    near, far = (accounting.photon_flops(model.config, length) for length in (61, 121))
    # 60 tokens more under units, which 4 heads meet through a latent of 32 numbers: nothing else grows.
    assert far - near == 4 * 4 * 32 * 60


@pytest.mark.parametrize("preset", ["split", "paper"])
@pytest.mark.parametrize("length", [1, 11, 40])
def test_cache_bytes_of_a_hierarchy_are_those_of_its_cache(preset, length):
    config = converted(dense_config(), preset)
    model = presets.target_of(config).model(config).eval()
    cache = model(tokens(1, length), use_cache=True).past_key_values
    assert held(cache) == expected(config, length)


@pytest.mark.parametrize("name", GRAFTS)
def test_the_slope_is_what_is_added_per_token(name):
    config = photon_config(name)
    near, far = (accounting.cache_bytes(config, 144 * n) for n in (1, 11))
    assert accounting.growing_bytes_per_token(config) == pytest.approx((far.growing - near.growing) / 1440)
    assert far.constant == near.constant


@pytest.mark.parametrize("preset", ["split", "paper"])
def test_the_slope_of_a_hierarchy(preset):
    config = converted(dense_config(), preset)
    near, far = (accounting.cache_bytes(config, 16 * n) for n in (10, 90))
    assert accounting.growing_bytes_per_token(config) == pytest.approx((far.growing - near.growing) / 1280)


def tensors_of(layer) -> list[torch.Tensor]:
    """What a layer of transformers' caches holds: keys and values, or states."""
    if not hasattr(layer, "conv_states"):
        return [layer.keys, layer.values]
    return [state for state in (*layer.conv_states.values(), *layer.recurrent_states.values()) if state is not None]


@pytest.mark.parametrize(
    ("model_type", "changes"), [*((n, {}) for n in FAMILY_NAMES), ("mistral", {"sliding_window": 16})]
)
def test_the_dense_cache(model_type, changes):
    dense = dense_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(dense)
    cache = model(tokens(1, 40), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer))
    # transformers keeps one key less than the window: the next token brings its own.
    shape = accounting.Shape.of(dense)
    slack = 4 * shape.kv * sum(window is not None and 0 < window < 40 for window in shape.windows)
    assert accounting.dense_cache_bytes(dense, 40, 4) == held + slack


# --- work ---


@pytest.mark.parametrize("preset", PRESETS)
def test_layer_positions_are_those_that_run(preset):
    config = converted(dense_config(num_hidden_layers=8), preset)
    model = presets.target_of(config).model(config).eval()
    ran = []
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.register_forward_pre_hook(lambda _, inputs: ran.append(inputs[0].shape[0] * inputs[0].shape[1]))
    # The forward pass may pad to the end of the open top unit: compare the slope.
    counts, unit = [], accounting.costs_of(config).unit
    for length in (10 * unit, 20 * unit):
        ran.clear()
        model(tokens(1, length), use_cache=False)
        counts.append(sum(ran))
    assert accounting.layer_positions(config) * 10 * unit == pytest.approx(counts[1] - counts[0])


def test_the_presets_cost_what_the_design_says():
    dense = dense_config(num_hidden_layers=8)
    positions = {preset: accounting.layer_positions(converted(dense, preset)) for preset in PRESETS}
    assert positions["graft"] == 8
    assert positions["split"] < positions["paper"] < 8
    # One cell of 16: for two tokens, two halves of 8 numbers in 4 bits with a scale of two bytes each.
    assert accounting.growing_bytes_per_token(converted(dense)) == 2 * (4 + 2) / 2
    assert accounting.dense_cache_bytes(dense, 1) == 16 * 2 * 8 * 2


def test_flops_of_the_dense_model_by_hand():
    dense = dense_config(num_hidden_layers=2)
    linear = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert accounting.dense_flops(dense, 100) == 2 * (2 * linear + 64 * 32) + 4 * 2 * 100 * 32


@pytest.mark.parametrize("parts", [1, 2])
def test_flops_of_a_memory_count_the_tokens_under_units(parts):
    dense = dense_config(num_hidden_layers=8)
    cells = [f"{layer}:{head}" for layer in (1, 4, 7) for head in (0, 1)]
    config = converted(dense, memory_cells=cells, memory_bits=16, chunk_size=4, latents_per_unit=parts)
    near, far = (accounting.photon_flops(config, n) for n in (1600, 3200))
    # Per token: 3 layers meet 1600 tokens more, each of 4 heads through a latent of 2 * 2 * 8 numbers, or half.
    assert far - near == pytest.approx(4 * (3 * 4 * 32 / parts * 1600))
    assert accounting.growing_bytes_per_token(config, 2) == pytest.approx(3 * 32 * 2 / 4)
    assert accounting.dense_flops(dense, 3200) - accounting.dense_flops(dense, 1600) == 4 * 32 * 8 * 1600


@pytest.mark.parametrize(("bits", "half"), [(16, 16), (8, 8 + 2), (4, 4 + 2)])
def test_what_grows_and_is_computed_with_cells(bits, half):
    """Heads beside the cells neither store nor read what is far: layer 1 has one of two, layer 6 both."""
    dense = dense_config(num_hidden_layers=8)
    config = converted(dense, memory_cells=["1:1", "6:0", "6:1"], memory_bits=bits, chunk_size=4)
    assert accounting.growing_bytes_per_token(config, 2) == pytest.approx(3 * 2 * half / 4)
    assert accounting.cache_bytes(config, 6400).growing == 3 * 2 * half * ((6400 - 64) // 4)
    near, far = (accounting.photon_flops(config, n) for n in (1600, 3200))
    # Two query heads meet a latent of 2 * 8 numbers in layer 1, four one of 2 * 2 * 8 in layer 6.
    assert far - near == pytest.approx(4 * (2 * 16 + 4 * 32) * 1600)
    # The packing (a chunker's matrix per unit), the converter folded into a token's queries and outputs, and heads that
    # differ by nothing else.
    one, two = (converted(dense, memory_cells=cells, chunk_size=4) for cells in (["1:1"], ["1:0", "1:1"]))
    grown = accounting.photon_flops(two, 1) - accounting.photon_flops(one, 1)
    assert grown == 2 * (32 * 32 - 16 * 16 + 2 * 4 * 8 * (4 * 32 - 2 * 16))


def test_flops_of_what_is_near_grow_up_to_the_longest_window():
    """3 layers, each of 4 heads of dimension 8; windows of 5 that reach back to a multiple of 3, beside 2 sinks."""
    config = photon_config("memory")
    flops = [accounting.photon_flops(config, length) for length in range(12)]
    assert [after - before for before, after in zip(flops[7:], flops[8:], strict=False)][1:3] == [4 * 3 * 32, 0]
    local = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = photon_config("memory", "qwen2", memory_cells={0: [0, 1]}, **local)
    flops = [accounting.photon_flops(config, length) for length in (5, 6, 15, 16, 17)]
    assert flops[1] - flops[0] == 4 * 3 * 32, "layers that the family keeps local see what there is"


def test_what_autograd_keeps_of_a_memory():
    """Per cell and token 16 numbers of queries, 16 each of what is packed and unpacked, and a quarter latent."""
    config = converted(dense_config(num_hidden_layers=8), memory_cells=["1:1", "6:0", "6:1"], chunk_size=4)
    assert accounting.costs_of(config).memory_states == (3 * (16 + 16 + 16 + 4), 2 * (16 + 16 + 16 + 4))


def test_a_window_that_is_switched_off_is_none():
    """As Qwen's config.json states it."""
    content = {
        **dense_config("qwen2").to_dict(),
        "sliding_window": 16,
        "use_sliding_window": False,
        "layer_types": None,
    }
    assert set(accounting.Shape.of(content).windows) == {None}
    assert set(accounting.Shape.of({**content, "use_sliding_window": True}).windows) == {16}


def test_flops_of_layers_at_full_attention():
    dense = dense_config(num_hidden_layers=8)
    config = converted(dense, memory_cells=["7:0"], full_attention_layers=[0, 1])
    with_memory_alone = converted(dense, memory_cells=["7:0"])
    grown = [accounting.photon_flops(c, 3200) - accounting.photon_flops(c, 1600) for c in (config, with_memory_alone)]
    assert grown[0] - grown[1] == 4 * 32 * 2 * 1600


def test_a_7b_model_without_grouped_heads_is_converted_in_24_gib():
    """Its latents are the widest: 8,192 numbers, packed in two parts."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_size": 4096}
    dense = dense_config(**heads, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    cells = [f"{layer}:{head}" for layer in (19, 23, 27, 31) for head in range(32)]
    config = converted(dense, memory_cells=cells, chunk_size=4)
    assert config.latents_per_unit == 2 and len(config.memory_layers) == 4
    costs = accounting.costs_of(config)
    square = (4 * 4096) ** 2
    assert costs.fit_at_once == 1 and costs.fit_bytes == 2 * 16 * square
    result = accounting.estimate(dense, config, accounting.TrainingSetup(2048))
    assert 2 * accounting.photon_parameters(config) < result.conversion_bytes < 24 * 2**30
    # The default's cells are narrower: at most 5 of 32 heads in 16 layers, keys and values together, units of 2.
    default, square = converted(dense), (2 * 2 * 5 * 128) ** 2
    assert default.latents_per_unit == 1 and accounting.costs_of(default).fit_bytes == (16 + 1) * 16 * square
    assert (
        accounting.estimate(dense, default, accounting.TrainingSetup(2048)).conversion_bytes < result.conversion_bytes
    )


def test_the_fit_of_small_models_holds_all_moments_at_once():
    dense = dense_config(num_hidden_layers=16)
    config = converted(dense, memory_cells=["11:0", "11:1", "15:0", "15:1"], chunk_size=4)
    square = (4 * 32) ** 2
    assert accounting.costs_of(config).fit_bytes == 3 * 16 * square
    # A narrower layer is counted as the widest.
    config = converted(dense, memory_cells=["11:0", "15:0", "15:1"], chunk_size=4)
    assert accounting.costs_of(config).fit_bytes == 3 * 16 * square
    assert accounting.costs_of(converted(dense_config(), memory_cells=[])).fit_bytes == 0


# --- all of it ---


def test_the_estimate_is_shown_and_saved():
    dense = dense_config(num_hidden_layers=8)
    setup = accounting.TrainingSetup(2048, 2, zero_stage=3, num_processes=2)
    result = accounting.estimate(dense, converted(dense), setup, gpu_bytes=2**30)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["dense_parameters"] == accounting.dense_parameters(dense)
    assert content["added_parameters"] == content["photon_parameters"] - content["dense_parameters"] > 0
    assert content["kv_ratio"] == pytest.approx(6 / 512)
    assert content["memory"]["device"] == result.memory.device > 0
    assert content["fit"]["recommended"]["config"] == "zero2"
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(result.table())
    shown = console.export_text()
    for words in ("Cache per token", "1.2%", "trainable", "2 processes, ZeRO stage 3", "activations"):
        assert words in shown
    for words in ("Fits 2 GPUs of 1.00 GiB", "zero3_offload", "--config_file accelerate_configs/zero2.yaml"):
        assert words in shown


def test_the_estimate_counts_the_adapters_that_are_asked_for():
    dense = dense_config(num_hidden_layers=8)
    setup = accounting.TrainingSetup(64, rank=3, target_modules=("q_proj",))
    config = converted(dense, memory_cells=[])
    assert accounting.estimate(dense, config, setup).trainable_parameters == 3 * 8 * (32 + 32)


def test_without_a_gpu_nothing_is_recommended():
    dense = dense_config(num_hidden_layers=8)
    assert accounting.estimate(dense, converted(dense), accounting.TrainingSetup(64)).to_dict()["fit"] is None


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**40, "3.00 TiB")])
def test_bytes_are_readable(count, text):
    assert accounting.format_bytes(count) == text
