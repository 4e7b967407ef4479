"""The hierarchical model's function: the rules of the design on shaken weights, and an independent reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_hierarchical import Reference
from tiny import shake, tokens
from tiny_hierarchical import HIERARCHIES, base_config, hierarchical_config, hierarchical_model
from transformers import AutoModel, AutoModelForCausalLM

from photon_train.models import HierarchicalConfig, HierarchicalForCausalLM, HierarchicalModel

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-4
NAMES = sorted(HIERARCHIES)
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_function_is_what_the_words_say(name):
    model = hierarchical_model(name)
    reference = Reference(model.config, model.state_dict())
    for length in (1, 2, 6, 25):
        ids = tokens(1, length, seed=length)
        out = model(ids)
        torch.testing.assert_close(out.logits[0].double(), reference.logits(ids[0].tolist()), atol=TOLERANCE, rtol=0)
    if model.config.num_levels > 1:
        expected = reference.consistency(ids[0].tolist())
        torch.testing.assert_close(out.consistency_loss.double(), expected, atol=1e-5, rtol=0)


@PROPERTY
@given(data=st.data())
@torch.no_grad()
def test_any_accepted_configuration_is_what_the_words_say(data):
    draw, levels = data.draw, []
    layout = draw(st.sampled_from(["block", "stream"]))
    num_levels = draw(st.integers(1, 3))
    for index in range(num_levels):
        levels.append(
            {
                "chunk_size": draw(st.integers(2 if index == 0 else 1, 4)),
                "num_slots": draw(st.integers(1, 3)),
                "encoder_layers": draw(st.integers(1, 2)),
                "encoder_window": draw(st.sampled_from([None, 1, 4])),
                "decoder_layers": draw(st.integers(1, 2)),
            }
        )
    options = {"layout": layout, "levels": levels}
    if layout == "stream":
        top_unit_tokens = HierarchicalConfig(base_config=base_config(), levels=levels).top_unit_tokens
        options |= {"window": top_unit_tokens + draw(st.integers(0, 7)), "num_sinks": draw(st.integers(0, 7))}
    model = shake(HierarchicalForCausalLM(HierarchicalConfig(base_config=base_config(), **options))).eval()
    ids = tokens(1, draw(st.integers(1, 30)), seed=draw(st.integers(0, 99)))
    expected = Reference(model.config, model.state_dict()).logits(ids[0].tolist())
    torch.testing.assert_close(model(ids).logits[0].double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_causality_changing_a_token_changes_no_earlier_logit(name):
    model, ids = hierarchical_model(name), tokens(1, 29)
    reference = model(ids).logits
    for position in (0, 5, 12, 23, 28):
        changed = ids.clone()
        changed[0, position] = 3 if ids[0, position] != 3 else 4
        difference = (model(changed).logits - reference).abs().amax(-1)[0]
        assert difference[:position].sum() == 0
        assert difference[position] > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_no_blind_spot_every_earlier_token_reaches_every_logit(name):
    """One layer per stack and encoders without a window: nothing is reached by hopping."""
    levels = [{**level, "decoder_layers": 1, "encoder_window": None} for level in HIERARCHIES[name]["levels"]]
    model = hierarchical_model(name, levels=levels)
    embeds = model.model.embed_tokens(tokens(1, 26)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    for position in range(26):
        (gradient,) = torch.autograd.grad(logits[0, position].pow(2).sum(), embeds, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert reached[: position + 1].all(), f"logit {position} does not see {(~reached[: position + 1]).nonzero()}"
        assert not reached[position + 1 :].any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_length_and_any_padding_give_each_row_what_it_gets_alone(name):
    model = hierarchical_model(name)
    rows = [tokens(1, length, seed=length) for length in (1, 2, 7, 12, 13, 18)]
    alone = [model(row) for row in rows]
    width = 19
    for side in ("left", "right", "inside"):
        ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            where = torch.arange(row.shape[1])
            if side != "right":
                where = width - row.shape[1] + where
            if side == "inside":
                where[0] = 0
            ids[index, where], mask[index, where] = row[0], 1
        for use_cache in (False, True):
            out = model(ids, attention_mask=mask, use_cache=use_cache)
            for index, expected in enumerate(alone):
                found = out.logits[index][mask[index].bool()]
                torch.testing.assert_close(found, expected.logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
@torch.no_grad()
def test_every_family_decodes_what_it_reads_at_once(name, model_type):
    model, ids = hierarchical_model(name, model_type), tokens(2, 22)
    expected, cache, found = model(ids, use_cache=False).logits, model.new_cache(), []
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 15), (15, 16), (16, 22)):
        found.append(model(ids[:, begin:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_family_s_own_sliding_window_has_no_influence():
    model = hierarchical_model("block-2", base_config=base_config("mistral", sliding_window=2))
    ids = tokens(1, 19)
    expected = Reference(model.config, model.state_dict()).logits(ids[0].tolist())
    torch.testing.assert_close(model(ids).logits[0].double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
@torch.no_grad()
def test_windows_of_some_of_the_family_s_layers_have_none_either(name):
    """Stacks are made of layers from several places of the dense model."""
    mixed = base_config("qwen2", sliding_window=2, use_sliding_window=True, max_window_layers=1)
    model, plain, ids = hierarchical_model(name, base_config=mixed), hierarchical_model(name, "qwen2"), tokens(1, 19)
    expected, cache = plain(ids).logits, model.new_cache()
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    found = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(19)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_base_model_ends_with_its_norm_and_checks_positions():
    model, ids = hierarchical_model("block-2"), tokens(2, 11)
    out = model.model(ids, use_cache=False)
    torch.testing.assert_close(model.lm_head(out.last_hidden_state), model(ids).logits)
    assert out.past_key_values is None and model.model(ids).past_key_values.get_seq_length() == 11
    torch.testing.assert_close(model(ids, position_ids=torch.arange(4, 15)[None]).logits, model(ids).logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@torch.no_grad()
def test_bounded_cost_a_long_sequence_holds_no_dense_mask():
    """A T x T mask of 32k tokens would take 1 GiB as booleans; the whole pass stays far below."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    levels = [{"chunk_size": 16, "encoder_window": 32}]
    for layout in ({"layout": "block"}, {"layout": "stream", "window": 32, "num_sinks": 4}):
        config = HierarchicalConfig(base_config=base_config(**sizes), levels=levels, **layout)
        model, length, largest = shake(HierarchicalForCausalLM(config)).eval(), 32768, 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else [out]:
                    if isinstance(tensor, torch.Tensor):
                        largest = max(largest, tensor.untyped_storage().nbytes())
                return out

        with Watch():
            model(tokens(1, length), logits_to_keep=1, use_cache=False)
        assert largest <= length * 8 * 4 * 2  # the elements' states, in fp32, with as many slots as tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "rows"}, "layout='rows' is not one of block, stream"),
        ({"window": 8}, "layout=block has no window: leave window=8 out"),
        ({"num_sinks": 1}, "layout=block has no sinks: set num_sinks=1 to 0"),
        ({"layout": "stream"}, "window=None does not reach back .*top unit \\(4\\)"),
        ({"layout": "stream", "window": 3}, "window=3 does not reach back .*raise window or lower a chunk_size"),
        ({"levels": [{"chunks": 2}]}, "levels.0 has unknown keys .'chunks'.; known: .*chunk_size"),
        ({"levels": [{}, {"decoder_layers": 0}]}, "levels.1.decoder_layers=0 must be a whole number >= 1"),
        ({"levels": [{"encoder_layers": 0}]}, "levels.0.encoder_layers=0 must be a whole number >= 1"),
        ({"levels": [{"encoder_window": 0}]}, "levels.0.encoder_window=0 .*or null for unbounded"),
        ({"levels": [{"chunk_size": 1}]}, "must multiply to at least 2"),
        ({"base_config": {"hidden_size": 8}}, "base_config has no `model_type`"),
        ({"base_config": {"model_type": "gpt2"}}, "base_config.model_type='gpt2' is not one of llama"),
        ({"base_config": {"model_type": "llama", "attention_dropout": 0.1}}, "attention_dropout=0.1 is not supported"),
    ],
)
def test_settings_that_no_model_can_serve_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalConfig(**settings)


@torch.no_grad()
def test_bad_input_is_one_clear_error():
    model, ids = hierarchical_model("block-2"), tokens(2, 5)
    for wrong, message in (
        ({"output_attentions": True}, "output_attentions has no meaning"),
        ({"output_hidden_states": True}, "output_hidden_states has no meaning"),
        ({"position_ids": torch.ones(1, 5, dtype=torch.long)}, "position_ids must count"),
        ({"attention_mask": torch.zeros(2, 5)}, "no token in row 0"),
        ({"inputs_embeds": model.model.embed_tokens(ids)}, "either input_ids or inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **wrong)
    with pytest.raises(ValueError, match="the input has no tokens"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="attn_implementation='sdpa' out"):
        HierarchicalForCausalLM._from_config(hierarchical_config("block-1"), attn_implementation="sdpa")


def test_auto_classes_know_the_model():
    config = hierarchical_config("stream-1")
    assert isinstance(AutoModelForCausalLM.from_config(config), HierarchicalForCausalLM)
    assert isinstance(AutoModel.from_config(config), HierarchicalModel)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_saved_loads_without_the_package(tmp_path):
    model, ids = hierarchical_model("stream-2-slots", "qwen3"), tokens(2, 17)
    model.save_pretrained(tmp_path / "model")
    generated = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)
    torch.save({"ids": ids, "logits": model(ids).logits, "generated": generated}, tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['photon_train'] = sys.modules['photon_kernels'] = None\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True).eval()\n"
        "expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(model(expected['ids']).logits, expected['logits'])\n"
        "found = model.generate(expected['ids'], max_new_tokens=7, do_sample=False, eos_token_id=None)\n"
        "assert torch.equal(found, expected['generated'])\n"
        "assert type(AutoModel.from_pretrained('model', trust_remote_code=True)).__name__ == 'HierarchicalModel'\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment = kept | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
