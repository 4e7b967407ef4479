"""The paper's generation from reconstructions (definition A.3): what it computes, and what it cannot."""

from __future__ import annotations

import pytest
import torch
from tiny import photon_model, tokens

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine

NAMES = ["block-2", "block-2-one-slot", "block-3", "slots-2-decoder", "residual-2-decoder"]


def decode(model, ids, prompt):
    """Logits from position `prompt` - 1 on, and the cache."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1:]]
    for column in range(prompt, ids.shape[1]):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), out.past_key_values


def reference(model, ids, prompt):
    """The definition on a two-level model of isolated chunks, without any cache: every unit is computed anew."""
    photon, config = model.model, model.config
    (first, second), (lower, upper) = photon.levels, config.levels
    embeds = photon.embed_tokens(ids)
    chunk, group = lower["chunk_size"], upper["chunk_size"]
    pad = -embeds.shape[1] % (chunk * group) + chunk * group
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, pad))
    true_units = photon._ascend(padded, None)[2][0]
    known = prompt // chunk  # units that the prompt completes
    units, conditions, tops = [], [], []
    for index in range(padded.shape[1] // (chunk * group)):
        if index == 0:
            condition = photon.start(1)
        else:
            summaries = second.chunker(torch.cat(units, 1).unflatten(1, (-1, group)))
            tops = photon._encode(1, summaries, None)
            condition = tops[:, -1:]
        slots = second.converter(condition)
        held = torch.zeros(1, group, config.hidden_size)
        for place in range(group):
            predicted = photon._isolated(1, slots, held, None)[:, place]
            conditions.append(predicted)
            number = index * group + place
            held[:, place] = true_units[:, number] if number < known else predicted
        units.append(held)
    slots = first.converter(torch.stack(conditions, 1))
    hidden = photon._isolated(0, slots, padded, None)[:, 1 : ids.shape[1] + 1]
    return model.lm_head(photon.norm(hidden))[:, prompt - 1 :]


@pytest.mark.parametrize("name", ["block-2", "block-2-one-slot"])
@pytest.mark.parametrize("prompt", [1, 2, 5, 6, 9, 13])
@torch.no_grad()
def test_recgen_equals_its_definition(name, prompt):
    model, ids = photon_model(name), tokens(1, 27)
    model.set_protocol("recgen")
    logits, _ = decode(model, ids, prompt)
    torch.testing.assert_close(logits, reference(model, ids, prompt), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "block-3"])
@torch.no_grad()
def test_with_isolated_chunks_what_is_emitted_never_reaches_a_later_meta_context(name):
    model = photon_model(name)
    span, ids = model.config.top_span, tokens(1, 4 * model.config.top_span)
    other = ids.clone()
    other[:, span : 2 * span] = tokens(1, span, seed=7)  # another second meta-context, generated after the first
    assert not torch.equal(ids, other)
    later = slice(span, None)  # logits from the end of the second meta-context on
    differences = {}
    for protocol in ("hiergen", "recgen"):
        model.set_protocol(protocol)
        one, two = (decode(model, rows, span)[0][:, later] for rows in (ids, other))
        differences[protocol] = float((one - two).abs().max())
    assert differences["recgen"] == 0 and differences["hiergen"] > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_only_the_top_encoder_grows_and_rows_keep_their_own_phase(name):
    model = photon_model(name, **_unbounded(name))
    model.set_protocol("recgen")
    rows = [tokens(1, 24 + length, seed=length) for length in (3, 8)]
    alone = [decode(model, row, length)[0][0] for row, length in zip(rows, (3, 8), strict=True)]
    prompt, mask = torch.full((2, 8), 2), torch.zeros(2, 8, dtype=torch.long)
    for index, width in enumerate((3, 8)):
        prompt[index, -width:], mask[index, -width:] = rows[index][0, :width], 1
    out = model(prompt, attention_mask=mask, use_cache=True)
    cache, logits = out.past_key_values, [out.logits[:, -1]]
    lower = [encoder.nbytes() for encoder in cache.encoders[:-1]]
    top = cache.encoders[-1].nbytes()
    for step in range(24):
        column = torch.stack([row[0, width + step] for row, width in zip(rows, (3, 8), strict=True)])[:, None]
        logits.append(model(column, past_key_values=cache).logits[:, 0])
    for index, expected in enumerate(alone):
        torch.testing.assert_close(torch.stack(logits, 1)[index], expected, atol=2e-4, rtol=0)
    assert [encoder.nbytes() for encoder in cache.encoders[:-1]] == lower
    assert cache.encoders[-1].nbytes() > top


def _unbounded(name):
    """The hierarchy with no window in any encoder, so that a lower encoder would grow if it ran."""
    levels = photon_model(name).config.levels
    return {"levels": [{**level, "encoder_window": None} for level in levels]}


@torch.no_grad()
def test_beams_and_generate_work_with_recgen():
    model = photon_model("block-2")
    model.set_protocol("recgen")
    settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 2}
    greedy = model.generate(tokens(2, 7), **settings)
    prefix, _ = decode(model, greedy, 7)
    assert torch.equal(prefix[:, :-1].argmax(-1), greedy[:, 7:])
    assert model.generate(tokens(2, 7), num_beams=3, **settings).shape == greedy.shape


@pytest.mark.parametrize("name", ["block-1", "memory-2-sinks", "residual-2"])
def test_models_without_reconstructions_are_refused(name):
    with pytest.raises(ValueError, match="recgen.*needs at least two levels"):
        photon_model(name).set_protocol("recgen")


def test_unknown_protocols_and_the_engine_say_what_there_is():
    model = photon_model("block-2")
    with pytest.raises(ValueError, match="protocol 'x' is not one of hiergen, recgen"):
        model.set_protocol("x")
    model.set_protocol("recgen")
    with pytest.raises(PhotonError, match="hiergen"):
        Engine(model)
