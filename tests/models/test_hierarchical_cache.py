"""The hierarchical model over a cache: any split of any rows computes what a whole pass does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tokens
from tiny_hierarchical import HIERARCHIES, hierarchical_config, hierarchical_model

from photon_train.models import HierarchicalCache
from photon_train.models.stores_photon import GrowingStore

TOLERANCE = 2e-4
NAMES = sorted(HIERARCHIES)
PROPERTY = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def padded(rows: list[torch.Tensor], left: list[bool], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of rows ``[length]`` in `width` columns, and its mask."""
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), None) if left[index] else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(data=st.data())
@torch.no_grad()
def test_any_split_of_any_rows_equals_the_whole_pass(name, data):
    """Rows get 0 to 9 tokens each pass, padded on either side: every phase meets every other."""
    draw, model = data.draw, hierarchical_model(name)
    batch = draw(st.integers(1, 3))
    texts = [tokens(1, 40, seed=index)[0] for index in range(batch)]
    expected = [model(text[None], use_cache=False).logits[0] for text in texts]
    cache, had, mask = model.new_cache(), [0] * batch, None
    for _ in range(draw(st.integers(1, 8))):
        one_each = draw(st.booleans())
        counts = [draw(st.integers(0, 1 if one_each else 9)) for _ in range(batch)]
        counts = [min(max(count, not length), 40 - length) for count, length in zip(counts, had, strict=True)]
        width = max(*counts, 1) if batch > 1 else max(counts[0], 1)
        rows = [text[length : length + count] for text, length, count in zip(texts, had, counts, strict=True)]
        ids, new = padded(rows, [draw(st.booleans()) for _ in range(batch)], width)
        mask = new if mask is None else torch.cat([mask, new], dim=1)
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        for index, (length, count) in enumerate(zip(had, counts, strict=True)):
            found, wanted = logits[index][new[index].bool()], expected[index][length : length + count]
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        had = [length + count for length, count in zip(had, counts, strict=True)]
    assert cache.lengths.tolist() == had == cache.host_lengths and cache.get_seq_length() == mask.shape[1]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_token_by_token_equals_the_whole_pass(name):
    model, ids = hierarchical_model(name), tokens(2, 31)
    reference = model(ids, use_cache=False).logits
    for prompt in (1, 8):
        out = model(ids[:, :prompt])
        logits = [out.logits]
        for column in range(prompt, 31):
            logits.append(model(ids[:, column : column + 1], past_key_values=out.past_key_values).logits)
        torch.testing.assert_close(torch.cat(logits, 1), reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["block-3", "stream-2-slots"])
@torch.no_grad()
def test_levels_in_which_nothing_completes_are_not_computed(name):
    model, ids = hierarchical_model(name), tokens(2, 31)
    cache, calls = model(ids[:, :1]).past_key_values, {}
    for index, level in enumerate(model.model.levels):
        for kind in ("encoder", "decoder"):

            def record(module, inputs, key=(index, kind)):
                calls.setdefault(key, []).append(tuple(inputs[0].shape[:2]))

            getattr(level, kind).register_forward_pre_hook(record)
    config = model.config
    for column in range(1, 31):
        calls.clear()
        model(ids[:, column : column + 1], past_key_values=cache)
        for index in range(config.num_levels):
            completes = (column + 1) % config.unit_tokens(index + 1) == 0
            child = (column + 1) % config.unit_tokens(index) == 0
            slots = config.levels[index]["num_slots"]
            # Two rows, each element a query of its own: the child (where it is an element) and the next group's slots.
            elements = (slots if completes else 0) + (child and not (completes and config.slot_stream(index).isolated))
            assert calls.get((index, "encoder"), []) == ([(2, 1)] if completes else [])
            assert calls.get((index, "decoder"), []) == ([(2 * elements, 1)] if elements else [])


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots", "stream-3"])
@torch.no_grad()
def test_rows_can_be_selected_repeated_and_reordered(name):
    model = hierarchical_model(name)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (5, 9, 6)], [True] * 3, 9)
    for change, order in (
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2]),
    ):
        cache = model(ids, attention_mask=mask).past_key_values
        change(cache)
        texts = [torch.cat([ids[row][mask[row].bool()], tokens(1, 7, seed=50 + row)[0]]) for row in order]
        more = torch.stack([text[-7:] for text in texts])
        found = [model(more[:, :1], past_key_values=cache).logits, model(more[:, 1:], past_key_values=cache).logits]
        for index, text in enumerate(texts):
            expected = model(text[None], use_cache=False).logits[0, -7:]
            torch.testing.assert_close(torch.cat(found, 1)[index], expected, atol=TOLERANCE, rtol=0)


class FixedStore(GrowingStore):
    """Has room from the start, as an engine's does."""

    def allocate(self, rows, like):
        super().allocate(rows, like)
        super().reserve(40)

    def reserve(self, count):
        pass


def pooled(model, rows: int) -> HierarchicalCache:
    """A cache of more rows than passes use, as an engine has it."""
    config, cache = model.config, model.new_cache(growing=FixedStore)
    cache.allocate(rows, config.num_key_value_heads, config.head_dim, model.model.embed_tokens.weight)
    return cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [False, True])
@torch.no_grad()
def test_rows_of_a_pool_come_and_go_and_pieces_run_at_fixed_shapes(name, parts):
    model, ran = hierarchical_model(name), set()
    cache = pooled(model, 5)

    def in_buckets(part, level, rows, *tensors):
        """As CUDA graphs run a piece: the last row is repeated until there are a power of two."""
        number = len(rows)
        missing = (1 << (number - 1).bit_length()) - number
        inputs = [torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) for tensor in (rows, *tensors)]
        ran.add(part.__name__)
        return part(level, *inputs)[:number]

    if parts:
        cache.run = in_buckets
    texts = {row: tokens(1, 40, seed=row)[0] for row in (3, 0, 4)}
    had = dict.fromkeys(texts, 0)

    def feed(rows: list[int], counts: list[int]) -> None:
        cache.rows, cache.host_lengths = torch.tensor(rows), [had[row] for row in rows]
        new = [texts[row][had[row] : had[row] + count] for row, count in zip(rows, counts, strict=True)]
        ids, mask = padded(new, [False] * len(rows), max(counts))
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            expected = model(texts[row][None], use_cache=False).logits[0, had[row] : had[row] + count]
            torch.testing.assert_close(logits[index, :count], expected, atol=TOLERANCE, rtol=0)
            had[row] += count

    feed([3], [6])
    feed([0, 3], [9, 1])  # one begins while another goes on
    for _ in range(3):
        feed([3, 0], [1, 1])
    feed([4], [1])
    for step in range(13):
        feed([0, 4, 3] if step % 2 else [4, 0, 3], [1, 1, 1])
    assert ran == ({"_feed", "_close"} if parts else set())


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
@torch.no_grad()
def test_what_is_not_finite_in_one_row_reaches_no_other(name):
    """Neither now, nor through padding, nor by what a released row has left behind."""
    model, embed = hierarchical_model(name), None
    embed = model.model.embed_tokens
    rows = [tokens(1, n, seed=n)[0] for n in (13, 4)]
    ids, mask = padded(rows, [False, False], 13)
    embeds = embed(ids)
    embeds[0] = torch.nan
    cache = pooled(model, 2)
    out = model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache)
    expected = model(rows[1][None], use_cache=False).logits[0]
    torch.testing.assert_close(out.logits[1, :4], expected, atol=TOLERANCE, rtol=0)
    step = embed(tokens(2, 1))
    step[0] = torch.nan
    model(inputs_embeds=step, past_key_values=cache)
    cache.clear(0)
    cache.rows, cache.host_lengths, cache.lengths[0] = torch.tensor([0]), [0], 0
    found = model(rows[0][None], past_key_values=cache).logits[0]
    torch.testing.assert_close(found, model(rows[0][None], use_cache=False).logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_only_encoders_without_a_window_grow(name):
    config, model = hierarchical_config(name), hierarchical_model(name)
    sizes = {n: model(tokens(1, n)).past_key_values.kv_bytes() for n in (1, 64, 120)}
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    for n, held in sizes.items():
        units = sum(
            level["encoder_layers"] * (n // config.unit_tokens(index + 1))
            for index, level in enumerate(config.levels)
            if level["encoder_window"] is None
        )
        assert held == {**sizes[1], "growing": entry * units}
    elements = 0
    for index, level in enumerate(config.levels):
        slots, chunk = level["num_slots"], level["chunk_size"]
        ring = slots + chunk - 1
        if index == 0 and config.layout == "stream":
            chunks = -(-config.window // chunk)
            sinks = config.num_sinks + slots * -(-config.num_sinks // chunk)
            ring = sinks + config.window + slots * (chunks + 1)
        elements += level["decoder_layers"] * ring + level["encoder_layers"] * (level["encoder_window"] or 0)
    assert sizes[1]["constant"] == entry * elements
    cache = model(tokens(1, 50)).past_key_values
    for token in tokens(1, 70, seed=3)[0]:
        model(token[None, None], past_key_values=cache)
    assert cache.kv_bytes() == sizes[120]
    cache.reset()
    assert not cache.is_initialized and len(cache) == config.num_hidden_layers


def test_a_cache_takes_no_tokens_back():
    cache = HierarchicalCache(hierarchical_config("block-1"))
    with pytest.raises(NotImplementedError, match="cannot be cropped: completed chunks cannot be taken apart"):
        cache.crop(3)


@torch.no_grad()
def test_keys_and_values_have_the_type_of_the_computation_and_open_chunks_that_of_the_states():
    model, ids = hierarchical_model("block-2"), tokens(1, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(ids).past_key_values
    assert {t.dtype for ring in cache.rings() for t in ring.keys.values()} == {torch.bfloat16}
    assert {t.dtype for t in cache.open} == {torch.float32}
    assert {t.dtype for t in model.bfloat16()(ids).past_key_values.open} == {torch.bfloat16}
