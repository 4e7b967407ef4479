"""The paper's generation from reconstructions (definition A.3): what it computes, and what it cannot."""

from __future__ import annotations

import pytest
import torch
from reference_hierarchical import Reference
from tiny import tokens
from tiny_hierarchical import HIERARCHIES, hierarchical_model

from photon_train.models import HierarchicalCache

NAMES = ["block-2", "block-2-one-slot", "block-3", "stream-2", "stream-2-slots", "stream-3"]


def decode(model, ids, prompt):
    """Logits from position `prompt` - 1 on, and the cache."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1:]]
    for column in range(prompt, ids.shape[1]):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), out.past_key_values


class FromReconstructions(Reference):
    """Units below the top that the prompt does not complete are what the decoder above makes of them."""

    def generated(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits from position `prompt` - 1 on."""
        embeds = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        known = self.bottom_up(embeds[:prompt])
        spans, top = (
            [self.config.unit_tokens(level) for level in range(self.config.num_levels + 1)],
            self.config.num_levels,
        )
        states = [embeds] + [list(units) for units in known[1:]]
        # Level by level from the top, one unit after the other: each may need the ones before it.
        for length in range(prompt + 1, len(ids) + 1):
            for level in range(1, top + 1):
                if length % spans[level]:
                    break
                if level == top:
                    states[top] = self.encode(top - 1, states[top - 1])
                else:
                    states[level].append(self.conditions(states)[level - 1][len(states[level])])
        outputs = self.token_outputs(embeds, states)[prompt - 1 :]
        weight, norm = self.weights["lm_head.weight"], self.weights["model.norm.weight"]
        return torch.stack([weight @ self.rms(state, norm) for state in outputs])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_recgen_equals_its_definition(name):
    model, ids = hierarchical_model(name), tokens(1, 25)
    model.set_protocol("recgen")
    reference = FromReconstructions(model.config, model.state_dict())
    for prompt in (1, 9):
        logits, _ = decode(model, ids, prompt)
        expected = reference.generated(ids[0].tolist(), prompt)
        torch.testing.assert_close(logits[0].double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "stream-3"])
@torch.no_grad()
def test_several_tokens_after_the_prompt_are_read_one_by_one(name):
    model, ids = hierarchical_model(name), tokens(2, 25)
    model.set_protocol("recgen")
    expected, _ = decode(model, ids, 5)
    cache = model.new_cache()
    found = [model(ids[:, begin:end], past_key_values=cache).logits for begin, end in ((0, 5), (5, 13), (13, 25))]
    torch.testing.assert_close(torch.cat(found, 1)[:, 4:], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "block-3"])
@torch.no_grad()
def test_with_isolated_chunks_what_is_emitted_never_reaches_a_later_top_unit(name):
    model = hierarchical_model(name)
    span, ids = model.config.top_unit_tokens, tokens(1, 4 * model.config.top_unit_tokens)
    other = ids.clone()
    other[:, span : 2 * span] = tokens(1, span, seed=7)  # another second unit, generated after the first
    assert not torch.equal(ids, other)
    later = slice(span, None)  # logits from the end of the second unit on
    differences = {}
    for protocol in ("hiergen", "recgen"):
        model.set_protocol(protocol)
        one, two = (decode(model, rows, span)[0][:, later] for rows in (ids, other))
        differences[protocol] = float((one - two).abs().max())
    assert differences["recgen"] == 0 and differences["hiergen"] > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_only_the_top_encoder_grows_and_rows_keep_their_own_phase(name):
    levels = [{**level, "encoder_window": None} for level in HIERARCHIES[name]["levels"]]
    model = hierarchical_model(name, levels=levels)
    model.set_protocol("recgen")
    rows = [tokens(1, 16 + length, seed=length) for length in (3, 8)]
    alone = [decode(model, row, length)[0][0] for row, length in zip(rows, (3, 8), strict=True)]
    prompt, mask = torch.full((2, 8), 2), torch.zeros(2, 8, dtype=torch.long)
    for index, width in enumerate((3, 8)):
        prompt[index, -width:], mask[index, -width:] = rows[index][0, :width], 1
    out = model(prompt, attention_mask=mask, use_cache=True)
    cache, logits, stored = out.past_key_values, [out.logits[:, -1]], []
    for step in range(16):
        column = torch.stack([row[0, width + step] for row, width in zip(rows, (3, 8), strict=True)])[:, None]
        logits.append(model(column, past_key_values=cache).logits[:, 0])
        stored.append([encoder.states[0][0].shape[2] for encoder in cache.encoders])
    for index, expected in enumerate(alone):
        torch.testing.assert_close(torch.stack(logits, 1)[index], expected, atol=2e-4, rtol=0)
    assert all(first == last for first, last in zip(stored[0][:-1], stored[-1][:-1], strict=True))
    assert stored[-1][-1] > stored[0][-1]


@torch.no_grad()
def test_beams_and_generate_work_with_recgen():
    model = hierarchical_model("block-2")
    model.set_protocol("recgen")
    settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 2}
    greedy = model.generate(tokens(2, 7), **settings)
    prefix, _ = decode(model, greedy, 7)
    assert torch.equal(prefix[:, :-1].argmax(-1), greedy[:, 7:])
    assert model.generate(tokens(2, 7), num_beams=3, **settings).shape == greedy.shape


@torch.no_grad()
def test_what_cannot_be_is_refused():
    model = hierarchical_model("block-2")
    with pytest.raises(ValueError, match="recgen.*needs at least two levels"):
        hierarchical_model("block-1").set_protocol("recgen")
    for choose in (model.set_protocol, lambda name: HierarchicalCache(model.config, name)):
        with pytest.raises(ValueError, match="protocol 'x' is not one of hiergen, recgen"):
            choose("x")
    model.set_protocol("recgen")
    assert model.protocol == "recgen"
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    cache = model.new_cache()
    cache.allocate(2, model.config.num_key_value_heads, model.config.head_dim, model.model.embed_tokens.weight)
    cache.rows, cache.host_lengths = torch.tensor([0]), [0]
    model(ids[:1], attention_mask=mask[:1], past_key_values=cache)
    cache.rows, cache.host_lengths = None, [5, 0]
    with pytest.raises(ValueError, match="do not mix them with rows that go on"):
        model(ids, past_key_values=cache)
