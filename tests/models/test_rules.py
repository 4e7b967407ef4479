"""The rules of the design that may not be broken, each by name, on shaken weights and for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import GRAFTS, base_config, photon_config, photon_model, shake, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from photon_train.models import PhotonConfig, PhotonForCausalLM

TOLERANCE = 2e-4
NAMES = sorted(GRAFTS)
FAMILIES = ["mistral", "qwen2", "qwen3"]
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def feed(model, ids: torch.Tensor, sizes: list[int], **settings) -> torch.Tensor:
    """Logits of every position, fed in segments of `sizes` (the last one again and again)."""
    cache, logits, begin, sizes = model.new_cache(**settings), [], 0, list(sizes)
    while begin < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_causality_changing_a_token_changes_no_earlier_logit(name):
    model, ids = photon_model(name), tokens(1, 29)
    reference = model(ids).logits
    for position in (0, 5, 12, 23, 28):
        changed = ids.clone()
        changed[0, position] = 3 if ids[0, position] != 3 else 4
        difference = (model(changed).logits - reference).abs().amax(-1)[0]
        assert difference[:position].sum() == 0
        assert difference[position] > 1e-6


@pytest.mark.parametrize("name", [name for name in NAMES if GRAFTS[name]["memory_cells"]])
def test_no_blind_spot_every_earlier_token_reaches_every_logit(name):
    """One layer, so that nothing is reached by hopping from window to window; the cells of the entry's first."""
    cells = next(iter(GRAFTS[name]["memory_cells"].values()))
    changes = {"num_hidden_layers": 1, "memory_cells": {0: cells}, "full_attention_layers": []}
    model = photon_model(name, **changes)
    embeds = model.get_input_embeddings()(tokens(1, 26)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for position in range(26):
        (gradient,) = torch.autograd.grad(logits[0, position].pow(2).sum(), embeds, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert reached[: position + 1].all(), f"logit {position} does not see {(~reached[: position + 1]).nonzero()}"
        assert not reached[position + 1 :].any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_hf_alignment_any_length_and_any_padding_give_each_row_what_it_gets_alone(name):
    model = photon_model(name)
    rows = [tokens(1, length, seed=length) for length in (1, 2, 7, 12, 13, 18)]
    alone = [model(row).logits[0] for row in rows]
    width, generator = 19, torch.Generator().manual_seed(0)
    for side in ("left", "right", "between"):
        ids = torch.full((len(rows), width), 2)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            count = row.shape[1]
            where = torch.arange(width)[width - count :] if side == "left" else torch.arange(count)
            if side == "between":
                where = torch.randperm(width, generator=generator)[:count].sort().values
            ids[index, where], mask[index, where] = row[0], 1
        logits = model(ids, attention_mask=mask).logits
        for index, expected in enumerate(alone):
            torch.testing.assert_close(logits[index][mask[index].bool()], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_function_segments_of_any_size_equal_the_whole_pass(name):
    model, ids = photon_model(name), tokens(2, 41)
    reference = model(ids).logits
    for sizes in ([1], [2], [5, 1], [6, 3, 7], [17, 1, 1, 4, 11], [40, 1], [3, 30, 2]):
        torch.testing.assert_close(feed(model, ids, sizes), reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", ["memory", "memory-full"])
@torch.no_grad()
def test_one_function_in_every_family(name, model_type):
    model, ids = photon_model(name, model_type), tokens(2, 32)
    torch.testing.assert_close(feed(model, ids, [5, 9, 1]), model(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_function_in_batches_of_different_lengths_and_phases(name):
    model = photon_model(name)
    rows = [tokens(1, 26 + length, seed=length) for length in (1, 6, 9, 12)]
    alone = [model(row).logits[0] for row in rows]
    cache, fed = model.new_cache(), [0, 0, 0, 0]
    # Every pass feeds each row another number of tokens, none among them, padded on either side.
    for number, counts in enumerate(
        [(3, 8, 11, 14), (1, 1, 1, 1), (5, 0, 2, 9), (1, 1, 1, 1), (2, 6, 1, 1), (1, 1, 1, 1)]
    ):
        width = max(counts)
        ids, mask = torch.full((4, width), 2), torch.zeros(4, width, dtype=torch.long)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            where = slice(width - count, None) if number % 2 else slice(0, count)
            ids[index, where] = row[0, fed[index] : fed[index] + count]
            mask[index, where] = 1
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        for index, count in enumerate(counts):
            expected = alone[index][fed[index] : fed[index] + count]
            torch.testing.assert_close(logits[index][mask[index].bool()], expected, atol=TOLERANCE, rtol=0)
            fed[index] += count
    assert cache.lengths.tolist() == fed


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bounded_means_bounded_only_declared_caches_grow(name):
    config, model = photon_config(name), photon_model(name)
    sizes = {n: model(tokens(1, n), use_cache=True).past_key_values.kv_bytes() for n in (64, 65, 120)}
    assert sizes[64]["constant"] == sizes[120]["constant"]
    full = 2 * config.num_key_value_heads * config.head_dim * 4 * len(config.full_attention_layers)
    # Two halves of a latent per cell: fp32 numbers, or one or half a byte each and a scale of two bytes.
    half = {16: 4 * config.head_dim, 8: config.head_dim + 2, 4: config.head_dim // 2 + 2}[config.memory_bits]
    for n, held in sizes.items():
        alignment = config.chunk_size if config.memory_cells else 1
        outside = max(0, (n - 1) - config.window + 1) // alignment * alignment
        cells = sum(len(heads) for heads in config.memory_cells.values())
        assert held["growing"] == outside // config.chunk_size * cells * 2 * half + n * full
    cache = model(tokens(1, 50), use_cache=True).past_key_values
    for token in tokens(1, 70, seed=3)[0]:
        model(token[None, None], past_key_values=cache)
    assert cache.kv_bytes() == sizes[120]


@torch.no_grad()
def test_bounded_cost_a_long_sequence_holds_no_dense_mask():
    """A T x T mask of 32k tokens would take 1 GiB as booleans; the whole pass stays far below."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = photon_model("window", **sizes, num_key_value_heads=1, window=32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    length = 32768
    with Watch():
        model(tokens(1, length), logits_to_keep=1)
    assert largest <= length * 8 * 8  # positions, or states of the widest layer


@PROPERTY
@given(data=st.data())
@torch.no_grad()
def test_rules_hold_over_configurations(data):
    """Any configuration that is accepted computes the same in any segments, and sees no later token."""
    draw = data.draw
    depth, chunk = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    kinds = [draw(st.sampled_from(["window", "memory", "full"])) for _ in range(depth)]
    heads = st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True)
    config = PhotonConfig(
        **{key: value for key, value in base_config(num_hidden_layers=depth).items() if key != "model_type"},
        window=chunk + draw(st.integers(0, 9)),
        num_sinks=draw(st.integers(0, 6)),
        chunk_size=chunk,
        memory_cells={layer: draw(heads) for layer, kind in enumerate(kinds) if kind == "memory"},
        memory_bits=draw(st.sampled_from([16, 8, 4])),
        full_attention_layers=[layer for layer, kind in enumerate(kinds) if kind == "full"],
        latents_per_unit=draw(st.integers(1, 2)),
    )
    model = shake(PhotonForCausalLM(config)).eval()
    if config.memory_bits < 16:  # in fp32, two paths may round a number that lies between two levels apart
        model.double()
    ids = tokens(1, draw(st.integers(2, 45)), seed=draw(st.integers(0, 99)))
    reference = model(ids).logits
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    torch.testing.assert_close(feed(model, ids, sizes), reference, atol=TOLERANCE, rtol=0)
    changed = ids.clone()
    changed[0, -1] = 3
    torch.testing.assert_close(model(changed).logits[:, :-1], reference[:, :-1], atol=1e-5, rtol=0)


def dense_of(model: PhotonForCausalLM) -> torch.nn.Module:
    """The dense model with the same weights, by their own names."""
    dense = AutoModelForCausalLM.from_config(model.config.dense_config()).eval()
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".memory." in name for name in unexpected)
    return dense


@pytest.mark.parametrize("model_type", ["llama", *FAMILIES])
@torch.no_grad()
def test_a_window_over_the_whole_text_is_the_dense_model(model_type):
    model, ids = photon_model("memory", model_type, window=64), tokens(2, 40)
    dense = dense_of(model)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
    narrow = photon_model("memory", model_type)
    assert (narrow(ids).logits - dense(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(narrow(ids, as_dense=True).logits, dense(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="as_dense is for whole sequences"):
        narrow(ids, as_dense=True, past_key_values=narrow.new_cache())


@torch.no_grad()
def test_layers_that_the_family_keeps_local_stay_as_they_are():
    """Qwen2 with local layers among global ones: the local window is the family's, without sinks."""
    changes = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    model, ids = photon_model("memory", "qwen2", window=64, memory_cells={0: [0, 1]}, **changes), tokens(2, 40)
    assert [model.config.is_local(layer) for layer in range(3)] == [False, True, True]
    dense = dense_of(model)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(feed(model, ids, [7, 1, 13, 2]), dense(ids).logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model(ids, as_dense=True).logits, dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 0}, "window=0 must be a whole number >= 1"),
        ({"window": 2}, "window=2 is shorter than chunk_size=3"),
        ({"num_sinks": -1}, "num_sinks=-1"),
        ({"latents_per_unit": 3}, "latents_per_unit=3 must be 1 or 2"),
        ({"memory_bits": 2}, "memory_bits=2 must be 16, 8 or 4"),
        ({"memory_cells": {3: [0]}}, "memory_cells names layer 3; the model has layers 0...2"),
        ({"full_attention_layers": [1, 1]}, "full_attention_layers names a layer twice"),
        ({"memory_cells": {1: [0]}, "full_attention_layers": [1]}, r"layers \[1\] are in memory_cells and in"),
        ({"memory_cells": {1: [2]}}, r"memory_cells names key-value head 2 of layer 1; there are 0\.\.\.1"),
        ({"memory_cells": {1: [-1]}}, r"memory_cells names key-value head -1 of layer 1; there are 0\.\.\.1"),
        ({"memory_cells": {1: [0, 0]}}, r"memory_cells names a head of layer 1 twice: \[0, 0\]"),
        ({"memory_cells": {1: []}}, "memory_cells names no head of layer 1: name one, or drop the layer"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported: set it to 0"),
        ({"base_model_type": "gpt2"}, "model family 'gpt2' is not supported; supported families: cohere2"),
        ({"base_config": {}}, r"older photon-train \(base_config\): convert the dense model again"),
        ({"memory_layers": [1]}, r"older photon-train \(memory_layers\): convert the dense model again"),
    ],
)
def test_settings_that_no_model_can_serve_are_refused_by_name(changes, message):
    settings = {key: value for key, value in base_config().items() if key != "model_type"}
    with pytest.raises(ValueError, match=message):
        PhotonConfig(**{**settings, **GRAFTS["memory"], **changes})


def test_a_window_beyond_the_familys_is_refused():
    with pytest.raises(ValueError, match="window=64 exceeds the dense model's sliding_window=32"):
        photon_config("memory", "mistral", window=64, sliding_window=32)


def test_auto_classes_know_the_model(tmp_path):
    config = photon_config("memory")
    assert isinstance(AutoModelForCausalLM.from_config(config), PhotonForCausalLM)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict() and loaded.memory_cells == {0: [1], 2: [0, 1]}
