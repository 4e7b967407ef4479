"""Packed documents: each is computed as if it were alone, in every kind of layer and in both kinds of models."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from tiny import GRAFTS, VOCABULARY, photon_model, tokens
from tiny_hierarchical import HIERARCHIES, hierarchical_model
from tiny_hybrid import HYBRIDS, hybrid_model
from transformers import LlamaForCausalLM

from photon_train.models import documents_photon

MODELS = [*sorted(GRAFTS), *sorted(HYBRIDS), *sorted(HIERARCHIES)]
# One token, shorter than a unit and than a window, odd, and longer than several windows; the rows divide differently.
LENGTHS = [[1, 2, 23, 4, 13, 31], [40, 34], [74], [3] * 20 + [14]]
COLUMNS = 74


def model_of(name: str):
    if name in HYBRIDS:
        return hybrid_model(name)
    return photon_model(name) if name in GRAFTS else hierarchical_model(name)


def positions(lengths: list[list[int]]) -> torch.Tensor:
    """Position ids of rows of documents."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def documents(ids: torch.Tensor):
    """Row, columns and tokens of each document."""
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            yield row, slice(begin, begin + length), ids[row : row + 1, begin : begin + length]
            begin += length


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone(name: str) -> None:
    model, ids = model_of(name), tokens(len(LENGTHS), COLUMNS)
    packed = model(ids, position_ids=positions(LENGTHS)).logits
    for row, columns, document in documents(ids):
        torch.testing.assert_close(packed[row, columns], model(document).logits[0], atol=2e-4, rtol=0)
    whole = model(ids).logits
    if name != "window-one-token":
        assert (packed[1, 40:] - whole[1, 40:]).abs().max() > 1e-2, "documents see each other without position_ids"


@pytest.mark.parametrize("name", ["memory", "memory-full", "window"])
@torch.no_grad()
def test_as_dense_is_the_dense_model_of_each_document(name: str) -> None:
    model, ids = photon_model(name), tokens(len(LENGTHS), COLUMNS)
    dense = LlamaForCausalLM(model.config.dense_config()).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    packed = model(ids, position_ids=positions(LENGTHS), as_dense=True).logits
    for row, columns, document in documents(ids):
        torch.testing.assert_close(packed[row, columns], dense(document).logits[0], atol=2e-4, rtol=0)
    # transformers isolates the same documents of the same batch.
    theirs = dense(ids, position_ids=positions(LENGTHS), use_cache=False).logits
    torch.testing.assert_close(packed, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "as_dense"), [*((name, False) for name in MODELS), ("memory", True), ("memory-full", True)]
)
def test_a_neighbour_changes_nothing(name: str, as_dense: bool) -> None:
    """Logits and gradients of one document are the same bits whatever stands before and after it."""
    model, ids = model_of(name).train(), tokens(len(LENGTHS), COLUMNS)
    options, found, mine = {"as_dense": True} if as_dense else {}, [], slice(3, 26)
    for seed in (1, 2):
        others = tokens(len(LENGTHS), COLUMNS, seed)
        others[0, mine] = ids[0, mine]
        embeds = model.get_input_embeddings()(others).detach().requires_grad_()
        model.zero_grad()
        logits = model(inputs_embeds=embeds, position_ids=positions(LENGTHS), use_cache=False, **options).logits
        logits[0, mine].pow(2).sum().backward()
        outside = embeds.grad.clone()
        outside[0, mine] = 0
        assert not outside.any(), "a gradient reaches another document"
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([logits[0, mine].detach(), embeds.grad[0, mine], *gradients])
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["window", "memory", "memory-full", *HYBRIDS, "block-2", "stream-2-slots"])
@torch.no_grad()
def test_not_even_a_neighbour_that_is_no_number_changes_anything(name: str) -> None:
    """What fills a row up is never another document: a weight of zero would let it through."""
    model, ids, mine = model_of(name), tokens(len(LENGTHS), COLUMNS), slice(3, 26)
    embeds = model.get_input_embeddings()(ids)
    found = []
    for value in (0.1, torch.nan):
        others = torch.full_like(embeds, value)
        others[0, mine] = embeds[0, mine]
        found.append(model(inputs_embeds=others, position_ids=positions(LENGTHS)).logits[0, mine])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_sum_of_those_of_the_documents(name: str) -> None:
    model, ids = model_of(name).train(), tokens(len(LENGTHS), COLUMNS)
    model(ids, position_ids=positions(LENGTHS)).logits.pow(2).mean().backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for _, _, document in documents(ids):
        (model(document).logits.pow(2).sum() / (ids.numel() * VOCABULARY)).backward()
    for parameter, gradient in packed.items():
        alone = model.get_parameter(parameter).grad
        torch.testing.assert_close(gradient, alone, atol=1e-5 + 1e-4 * float(alone.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["memory", "memory-full", "delta-nets", "block-2", "stream-2-slots"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    ids, gradients = tokens(len(LENGTHS), COLUMNS), []
    for checkpointing in (False, True):
        model = model_of(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, position_ids=positions(LENGTHS), labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["memory", "block-2"])
@torch.no_grad()
def test_padding_and_positions_that_a_text_was_cut_at_change_nothing(name: str) -> None:
    model, ids = model_of(name), tokens(2, 30)
    expected = model(ids, position_ids=positions([[12, 18], [30]])).logits
    shifted = positions([[12, 18], [30]])
    shifted[0, :12] += 5
    torch.testing.assert_close(model(ids, position_ids=shifted).logits, expected)
    for left in (False, True):
        wide, mask = torch.full((2, 35), 2), torch.zeros(2, 35, dtype=torch.long)
        counted = torch.zeros(2, 35, dtype=torch.long)
        where = slice(5, 35) if left else slice(0, 30)
        wide[:, where], mask[:, where], counted[:, where] = ids, 1, positions([[12, 18], [30]])
        found = model(wide, attention_mask=mask, position_ids=counted).logits
        torch.testing.assert_close(found[:, where], expected)


@pytest.mark.parametrize("name", ["memory", "stream-2"])
@torch.no_grad()
def test_packed_documents_have_no_cache(name: str) -> None:
    model, ids = model_of(name), tokens(1, 9)
    packed = positions([[4, 5]])
    assert model.config.use_cache and model(ids, position_ids=packed).past_key_values is None
    for options in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(ValueError, match="position_ids start again at 0, .* give use_cache=False"):
            model(ids, position_ids=packed, **options)
    with pytest.raises(ValueError, match="or of each of its documents from 0 on, one by one"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4, 5]]), use_cache=False)


@torch.no_grad()
def test_the_consistency_term_is_that_of_the_documents_as_rows() -> None:
    model, ids = hierarchical_model("block-3"), tokens(2, 48)
    packed = model(ids, position_ids=positions([[24, 24], [24, 24]])).consistency_loss
    torch.testing.assert_close(packed, model(ids.view(4, 24)).consistency_loss)
    # Of documents of several lengths, every unit counts once.
    uneven = model(ids[:1], position_ids=positions([[20, 28]])).consistency_loss
    padded, mask = torch.full((2, 28), 2), torch.ones(2, 28, dtype=torch.long)
    padded[0, :20], padded[1], mask[0, 20:] = ids[0, :20], ids[0, 20:], 0
    torch.testing.assert_close(uneven, model(padded, attention_mask=mask).consistency_loss)


def test_every_process_calls_the_modules_of_a_layer_equally_often() -> None:
    """Sharded modules are gathered by all processes together: how a batch is packed must not show in their calls."""
    for name in ("memory", "block-2"):
        model, ids, calls, found = model_of(name), tokens(1, 40), [], []
        for module_name, module in model.named_modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_hook(partial(lambda calls, of, *_: calls.append(of), calls, module_name))
        for grad in (True, False):
            for lengths in ([40], [1] * 40, [20, 20], [2, 30, 8], [3, 3, 5, 13, 16]):
                calls.clear()
                with torch.set_grad_enabled(grad):
                    model(ids, position_ids=positions([lengths]), use_cache=False)
                found.append(list(calls))
        assert all(each == found[0] for each in found)


def _padded(sizes: list[int], cuts: tuple[int, ...]) -> int:
    edges = [0, *cuts, len(sizes)]
    return sum((stop - begin) * sizes[stop - 1] for begin, stop in zip(edges, edges[1:], strict=False))


def test_documents_are_divided_into_few_groups_with_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 11):
        # Every length differs from the next by more than what counts as one length.
        sizes = torch.cumprod(1.3 + torch.rand(count, generator=generator), 0).mul(8).long().tolist()
        divided = documents_photon._divide(sizes)
        assert [number for part in divided for number in part] == list(range(count))
        assert len(divided) == min(count, documents_photon.NUM_GROUPS)

        least = min(_padded(sizes, cuts) for cuts in combinations(range(1, count), len(divided) - 1))
        assert sum(len(part) * sizes[part[-1]] for part in divided) == least
    assert documents_photon._divide([5] * 9) == [range(9)]


@torch.no_grad()
def test_fused_windows_hold_documents_apart() -> None:
    """The masks of flex_attention (here uncompiled) are given documents as rows, too."""
    for name in ("window", "memory", "memory-full"):
        model, ids = photon_model(name), tokens(len(LENGTHS), COLUMNS)
        expected = model(ids, position_ids=positions(LENGTHS)).logits
        model.set_fused_windows("yes")
        found = model(ids, position_ids=positions(LENGTHS)).logits
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
