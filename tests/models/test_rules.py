"""The rules of the design that may not be broken, each by name, on shaken weights and for every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import HIERARCHIES, base_config, photon_config, photon_model, shake, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from photon_train.models import PhotonCache, PhotonConfig, PhotonForCausalLM

TOLERANCE = 2e-4
NAMES = sorted(HIERARCHIES)
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def decode(model: PhotonForCausalLM, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of every position from `prompt` - 1 on: one pass over the prompt, then token by token."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1:]]
    for column in range(prompt, ids.shape[1]):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
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


@pytest.mark.parametrize("name", NAMES)
def test_no_blind_spot_every_earlier_token_reaches_every_logit(name):
    """One layer per stack, so that nothing is reached by hopping from window to window."""
    shallow = {key: value for key, value in HIERARCHIES[name].items() if key not in ("full_attention_layers",)}
    shallow["levels"] = [
        {**level, "decoder_layers": min(level["decoder_layers"], 1)} for level in HIERARCHIES[name]["levels"]
    ]
    if shallow.get("branch_layer"):
        shallow["levels"][0]["decoder_layers"] = 2
    layers = shallow["levels"][0]["decoder_layers"]
    if shallow["conditioning"] == "memory":
        shallow["memory_layers"], shallow["memory_levels"] = [layers - 1], [len(shallow["levels"])]
        shallow["memory_sources"] = None
    config = PhotonConfig(base_config=base_config(), **shallow)
    model = shake(PhotonForCausalLM(config)).eval()
    ids = tokens(1, 26)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for position in range(0, 26):
        (gradient,) = torch.autograd.grad(logits[0, position].pow(2).sum(), embeds, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert reached[: position + 1].all(), f"logit {position} does not see {(~reached[: position + 1]).nonzero()}"
        assert not reached[position + 1 :].any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_hf_alignment_any_length_and_both_paddings_give_each_row_what_it_gets_alone(name):
    model = photon_model(name)
    rows = [tokens(1, length, seed=length) for length in (1, 2, 7, 12, 13, 18)]
    alone = [model(row).logits[0] for row in rows]
    width = 19
    for side in ("left", "right"):
        ids = torch.full((len(rows), width), 2)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(width - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
            ids[index, where], mask[index, where] = row[0], 1
        logits = model(ids, attention_mask=mask).logits
        for index, expected in enumerate(alone):
            torch.testing.assert_close(logits[index][mask[index].bool()], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_function_decoding_with_the_cache_equals_the_full_forward(name):
    model, ids = photon_model(name), tokens(2, 31)
    reference = model(ids).logits
    for prompt in (1, 2, 5, 6, 8, 12, 17, 24):
        logits = decode(model, ids, prompt)
        torch.testing.assert_close(logits, reference[:, prompt - 1 :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["memory-2-sinks", "block-2", "residual-1-change"])
@torch.no_grad()
def test_one_function_in_every_family(name, model_type):
    model, ids = photon_model(name, model_type), tokens(2, 22)
    torch.testing.assert_close(decode(model, ids, 5), model(ids).logits[:, 4:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_function_in_batches_of_different_lengths_and_phases(name):
    model = photon_model(name)
    rows = [tokens(1, 17 + length, seed=length) for length in (1, 6, 9, 12)]
    widths = [row.shape[1] - 9 for row in rows]
    prompt, mask = torch.full((4, max(widths)), 2), torch.zeros(4, max(widths), dtype=torch.long)
    for index, (row, width) in enumerate(zip(rows, widths, strict=True)):
        prompt[index, -width:], mask[index, -width:] = row[0, :width], 1
    out = model(prompt, attention_mask=mask, use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(9):
        column = torch.stack([row[0, width + step] for row, width in zip(rows, widths, strict=True)])[:, None]
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        out = model(column, attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits[:, 0])
    for index, row in enumerate(rows):
        expected = model(row).logits[0, widths[index] - 1 :]
        torch.testing.assert_close(torch.stack(logits, 1)[index], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bounded_means_bounded_only_declared_caches_grow(name):
    config, model = photon_config(name), photon_model(name)
    sizes = {n: model(tokens(1, n), use_cache=True).past_key_values.kv_bytes() for n in (64, 65, 120)}
    assert sizes[64]["constant"] == sizes[120]["constant"] and sizes[64]["buffers"] == sizes[120]["buffers"]
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    for n, held in sizes.items():
        units = sum(
            lv["encoder_layers"] * (n // config.top_span) for lv in config.levels if lv["encoder_window"] is None
        )
        units += sum(n // config.span(level) for level in config.source_levels.values())
        slots = config.levels[0]["num_slots"] * -(-n // config.levels[0]["chunk_size"]) if config.uses_slots else 0
        assert held["growing"] == entry * (units + (n + slots) * len(config.full_attention_layers))
    cache = model(tokens(1, 50), use_cache=True).past_key_values
    for token in tokens(1, 70, seed=3)[0]:
        model(token[None, None], past_key_values=cache)
    assert cache.kv_bytes() == sizes[120]


@torch.no_grad()
def test_bounded_cost_a_long_sequence_holds_no_dense_mask():
    """A T x T mask of 32k tokens would take 1 GiB as booleans; the whole pass stays far below."""
    config = PhotonConfig(
        base_config=base_config(
            num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1
        ),
        levels=[{"chunk_size": 16, "decoder_layers": 1, "encoder_window": 32}],
        conditioning="residual",
        window=32,
    )
    model = shake(PhotonForCausalLM(config)).eval()
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
    assert largest <= length * 64 * 8  # two blocks of 32 keys per query, at most 8 bytes each


def test_stream_window_must_reach_back_over_the_open_unit():
    with pytest.raises(ValueError, match="window=5 .*at least.*6"):
        photon_config("residual-2", window=5)


@PROPERTY
@given(data=st.data())
@torch.no_grad()
def test_rules_hold_over_configurations(data):
    """Any configuration that is accepted decodes as it trains, and sees no later token."""
    draw = data.draw
    layout = draw(st.sampled_from(["block", "stream"]))
    conditioning = "slots" if layout == "block" else draw(st.sampled_from(["slots", "residual", "memory"]))
    num_levels = draw(st.integers(1, 3))
    depth = draw(st.integers(1, 3))
    levels = []
    for index in range(num_levels):
        chunk = draw(st.integers(2 if index == 0 else 1, 3))
        if layout == "block":
            slots, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        else:
            slots = draw(st.sampled_from([1, chunk]))
            layers = 0 if conditioning == "memory" else draw(st.integers(0, 1))
        levels.append(
            {
                "chunk_size": chunk,
                "num_slots": slots,
                "encoder_layers": draw(st.integers(0, 2)),
                "encoder_window": draw(st.sampled_from([None, 1, 4])) if index + 1 < num_levels else None,
                "decoder_layers": layers if index else depth,
            }
        )
    options = {"layout": layout, "conditioning": conditioning, "levels": levels}
    if layout == "stream":
        span = 1
        for entry in levels:
            span *= entry["chunk_size"]
        options["window"] = span + draw(st.integers(0, 5))
        options["num_sinks"] = draw(st.integers(0, 5))
        options["unit_positions"] = draw(st.sampled_from(["index", "scaled"]))
        if conditioning != "slots":
            options["branch_layer"] = draw(st.integers(0, depth - 1))
        if conditioning == "memory":
            options["memory_layers"] = [depth - 1]
            options["memory_pooling"] = draw(st.sampled_from(["mean", "linear", "latent"]))
        else:
            options["full_attention_layers"] = draw(st.sampled_from([[], [depth - 1]]))
            options["summary"] = draw(st.sampled_from(["state", "change"]))
    model = shake(PhotonForCausalLM(PhotonConfig(base_config=base_config(), **options))).eval()
    length, prompt = draw(st.integers(2, 30)), draw(st.integers(1, 29))
    ids = tokens(1, length, seed=draw(st.integers(0, 99)))
    reference = model(ids).logits
    prompt = min(prompt, length)
    torch.testing.assert_close(decode(model, ids, prompt), reference[:, prompt - 1 :], atol=TOLERANCE, rtol=0)
    changed = ids.clone()
    changed[0, -1] = 3
    torch.testing.assert_close(model(changed).logits[:, :-1], reference[:, :-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_over_the_whole_text_is_the_dense_model():
    dense = shake(LlamaForCausalLM(LlamaConfig(**{k: v for k, v in base_config().items() if k != "model_type"}))).eval()
    config = photon_config("memory-2-sinks", window=64)
    model = PhotonForCausalLM(config).eval()
    state = {
        name.replace("model.layers.", "model.levels.0.decoder.layers."): t for name, t in dense.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("decoder.layers" not in name for name in missing)
    ids = tokens(2, 40)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(shake_new(model)(ids, as_dense=True).logits, dense(ids).logits, atol=1e-4, rtol=0)


def shake_new(model):
    """Shake what the hierarchy adds to a stream, the dense layers left alone."""
    shake(model.model.levels[0].decoder.memory)
    return model


def test_auto_classes_know_the_model():
    assert isinstance(AutoModelForCausalLM.from_config(photon_config("memory-1")), PhotonForCausalLM)
    assert PhotonCache(photon_config("memory-1")).is_empty
