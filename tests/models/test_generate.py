"""transformers' own `generate` on a PHOTON model, against a loop over the teacher-forced forward."""

from __future__ import annotations

import pytest
import torch
from tiny import GRAFTS, photon_model, tokens
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

NEW = 14
NAMES = sorted(GRAFTS)


@pytest.fixture(params=["memory", "memory-full", "window"])
def model(request):
    return photon_model(request.param)


@torch.no_grad()
def naive_greedy(model, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, ids, **settings):
    model.generation_config.eos_token_id = None
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_the_full_forward(name):
    model = photon_model(name)
    for length in (1, 7, 12):
        prompt = tokens(2, length, seed=length)
        assert torch.equal(generate(model, prompt), naive_greedy(model, prompt, NEW))


def test_generate_without_cache_is_the_same(model):
    prompt = tokens(2, 9)
    assert torch.equal(generate(model, prompt, use_cache=False), generate(model, prompt))


def test_left_padded_batch_equals_each_prompt_alone(model):
    rows = [tokens(1, length, seed=length) for length in (3, 8, 11)]
    ids, mask = torch.full((3, 11), 2), torch.zeros(3, 11, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    out = generate(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(out[index, 11:], naive_greedy(model, row, NEW)[0, row.shape[1] :])


def test_beam_search_finds_what_it_finds_without_a_cache(model):
    prompt = tokens(2, 5)
    with_cache = generate(model, prompt, num_beams=3)
    assert torch.equal(with_cache, generate(model, prompt, num_beams=3, use_cache=False))
    assert with_cache.shape == (2, 5 + NEW)


def test_sampling_is_a_function_of_the_seed_and_returns_several_sequences(model):
    prompt = tokens(2, 6)

    def sample():
        torch.manual_seed(7)
        return generate(model, prompt, do_sample=True, top_k=20, temperature=0.8, num_return_sequences=3)

    first = sample()
    assert torch.equal(first, sample())
    assert first.shape == (6, 6 + NEW) and len({tuple(row.tolist()) for row in first}) > 2


def test_streamer_receives_every_token(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, prompt = Collect(), tokens(1, 6)
    out = generate(model, prompt, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_stopping_criteria_and_end_token_stop(model):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 10)

    prompt = tokens(1, 6)
    assert generate(model, prompt, stopping_criteria=StoppingCriteriaList([After()])).shape[1] == 10
    free = generate(model, prompt)[0, 6:]
    end = int(free[5])
    stopped = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    assert int(stopped[0, -1]) == end and stopped.shape[1] == 6 + int((free == end).nonzero()[0]) + 1


def test_going_on_from_a_cache_equals_generating_at_once(model):
    prompt, more = tokens(2, 9), tokens(2, 5, seed=4)
    out = generate(model, prompt, return_dict_in_generate=True)
    # The last generated token has not been fed yet: the next call feeds it with the new text.
    text = torch.cat([out.sequences, more], dim=1)
    continued = generate(model, text, past_key_values=out.past_key_values)
    assert torch.equal(continued, naive_greedy(model, text, NEW))


def test_a_prompt_may_be_embeddings(model):
    prompt = tokens(2, 7)
    out = generate(model, None, inputs_embeds=model.get_input_embeddings()(prompt))
    assert torch.equal(out, naive_greedy(model, prompt, NEW)[:, 7:])


def test_a_pad_id_inside_a_prompt_without_a_mask_is_a_token(model):
    """As in the dense model's forward; `generate` infers a mask from it, and then leaves it out."""
    ids = tokens(1, 12)
    ids[0, 4] = model.config.pad_token_id
    out = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1])
    kept = torch.cat([ids[:, :4], ids[:, 5:]], dim=1)
    assert torch.equal(generate(model, ids)[:, 12:], naive_greedy(model, kept, NEW)[:, 11:])


def test_the_dense_function_generates_without_a_cache_only():
    model, prompt = photon_model("memory"), tokens(2, 7)
    out = generate(model, prompt, as_dense=True, use_cache=False)
    assert torch.equal(out, naive_greedy(lambda ids: model(ids, as_dense=True), prompt, NEW))
    with pytest.raises(ValueError, match="as_dense"):
        generate(model, prompt, as_dense=True)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_and_an_assistant_give_the_greedy_tokens(name):
    model, prompt = photon_model(name), tokens(1, 9).repeat(1, 3)
    expected = naive_greedy(model, prompt, NEW)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4), expected)
    # An assistant that drafts other tokens than the model wants: drafts are taken back at every step.
    assistant = photon_model("window", seed=5)
    assistant.generation_config.eos_token_id = None
    assert torch.equal(generate(model, prompt, assistant_model=assistant), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_crop_takes_tokens_back_where_the_window_allows_it(name):
    model, ids, other = photon_model(name), tokens(2, 40), tokens(2, 20, seed=9)
    for fed, left in ((3, 2), (40, 37), (40, 32), (25, 24)):
        cache = model.new_cache(rollback=8)
        model(ids[:, : fed - 1], past_key_values=cache)
        model(ids[:, fed - 1 : fed], past_key_values=cache)
        cache.crop(left - fed)
        assert cache.get_seq_length() == left and cache.lengths.tolist() == [left] * 2
        text = torch.cat([ids[:, :left], other], dim=1)
        logits = [model(other[:, :7], past_key_values=cache).logits]
        logits += [model(other[:, i : i + 1], past_key_values=cache).logits for i in range(7, 20)]
        torch.testing.assert_close(torch.cat(logits, 1), model(text).logits[:, left:], atol=2e-4, rtol=0)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"cannot take 9 of them back: use PhotonCache\(config, rollback=9\)"):
        cache.crop(-9)
    with pytest.raises(ValueError, match="takes 50 tokens back; a row has 40"):
        cache.crop(-50)
    with pytest.raises(ValueError, match="as a negative number"):
        cache.crop(3)


@pytest.mark.parametrize("name", ["memory", "memory-no-sinks", "memory-full"])
@torch.no_grad()
def test_what_crop_allows_goes_on_as_a_text_of_its_own(name):
    """At every length, whether its window begins at a unit or within one; and the fewest can be taken back."""
    model, ids, other = photon_model(name), tokens(1, 40), tokens(1, 8, seed=9)
    for fed in range(20, 20 + 2 * model.config.chunk_size):
        allowed = 0
        for removed in range(1, 2 * model.config.chunk_size + 2):
            cache = model.new_cache()
            model(ids[:, :fed], past_key_values=cache)
            try:
                cache.crop(-removed)
            except ValueError:
                continue
            allowed, left = allowed + 1, fed - removed
            logits = [model(other[:, i : i + 1], past_key_values=cache).logits for i in range(8)]
            expected = model(torch.cat([ids[:, :left], other], dim=1)).logits[:, left:]
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-4, rtol=0)
        assert allowed


@torch.no_grad()
def test_rows_of_several_lengths_change_places(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    ids, new = tokens(2, 12), tokens(2, 1, seed=9)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1, 0]))
    found = model(new, past_key_values=cache).logits
    rows = ((ids[1:, 5:], new[:1]), (ids[:1], new[1:]))
    expected = [model(torch.cat(row, dim=1)).logits[:, -1:] for row in rows]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=0)


def test_what_cannot_work_says_so(model):
    prompt = tokens(1, 6)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([prompt[0].tolist()])
    with pytest.raises(ValueError, match="must be a PhotonCache, not DynamicCache"):
        generate(model, prompt, past_key_values=DynamicCache())
    for name in ("static", "dynamic", "hybrid", "paged"):
        with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
            generate(model, prompt, cache_implementation=name)
    with pytest.raises(ValueError, match="cache_implementation='hybrid'"):
        model.generate(prompt, generation_config=GenerationConfig(cache_implementation="hybrid", max_new_tokens=2))
