"""The model against a brute-force float64 reference that shares no code with it; its operations against a softmax."""

from __future__ import annotations

import brute_force
import pytest
import torch
from tiny import GRAFTS, photon_model, tokens

from photon_train.models import flex_photon, softmax_photon
from photon_train.models.attention_photon import NewElements
from photon_train.models.memory_segment_photon import MemorySegment


@pytest.mark.parametrize("length", [1, 11, 26])
@pytest.mark.parametrize("name", sorted(GRAFTS))
@torch.no_grad()
def test_the_model_computes_what_the_design_says(name, length):
    model, ids = photon_model(name), tokens(1, length, seed=length)
    expected = brute_force.logits(model.state_dict(), model.config.to_dict(), ids[0].tolist())
    # The family computes norms and rotations in fp32, whatever the weights are.
    torch.testing.assert_close(model.double()(ids).logits[0], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-8-bits", "memory-4-bits", "memory-full", "window"])
@torch.no_grad()
def test_decoding_computes_what_the_design_says(name):
    model, ids = photon_model(name), tokens(1, 24)
    expected = brute_force.logits(model.state_dict(), model.config.to_dict(), ids[0].tolist())
    cache, found = model.new_cache(), []
    for column in range(24):
        found.append(model(ids[:, column : column + 1], past_key_values=cache).logits[0, 0])
    torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-4, rtol=0)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


class Identity:
    """A memory that packs and unpacks nothing, so that far keys are the layer's own."""

    layer_idx = 0

    def __init__(self, heads: int, kv_heads: int, cells: tuple[int, ...]) -> None:
        self.memory, self.cells = self, cells
        self.other_cells = tuple(head for head in range(kv_heads) if head not in cells)
        owner = [head // (heads // kv_heads) for head in range(heads)]
        self.query_heads = tuple(head for head in range(heads) if owner[head] in cells)
        self.other_query_heads = tuple(head for head in range(heads) if owner[head] not in cells)

    def pack(self, keys, values):
        return (keys, values), (keys, values)

    def unpack(self, keys, values):
        return keys, values


def segment(length, window, chunk, num_sinks, batch=2) -> MemorySegment:
    index = torch.arange(length)[None]
    start = index - window + 1
    start = start - start % chunk
    units = max(0, int(start[0, -1])) // chunk
    made = MemorySegment(
        NewElements(batch, index, base=0),
        chunk_size=chunk,
        units=None,
        packed=(torch.zeros(1, dtype=torch.long), torch.tensor([units])),
        host_packed=([0] * batch, [units] * batch),
        rotation=lambda positions: None,
        start=start,
        reach=window + chunk - 2,
        period=chunk,
        num_sinks=num_sinks,
        fused="no",
    )
    return made


@pytest.fixture(params=["flash", "plain"])
def implementation(request, monkeypatch):
    """The operation of the CPU, and what runs where there is none."""
    if request.param == "plain":
        monkeypatch.setattr(softmax_photon, "_FLASH_DEVICE", "none")


@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (0.7, False), (None, True)])
@pytest.mark.parametrize(
    "length, window, chunk, num_sinks, heads, kv_heads, cells",
    [
        (53, 8, 4, 3, 4, 2, (0, 1)),
        (64, 8, 4, 0, 2, 2, (0, 1)),
        (7, 8, 4, 4, 4, 1, (0,)),
        (401, 40, 8, 4, 2, 1, (0,)),
        (300, 5, 1, 2, 2, 1, (0,)),
        (53, 8, 4, 3, 4, 2, (1,)),
        (61, 9, 2, 2, 12, 4, (0, 2)),
        (64, 8, 4, 0, 3, 3, (1,)),
    ],
)
def test_outputs_and_gradients_are_those_of_one_softmax(
    length, window, chunk, num_sinks, heads, kv_heads, cells, softcap, has_sinks, implementation, monkeypatch
):
    torch.manual_seed(0)
    query, key, value = random(2, heads, length, 8), random(2, kv_heads, length, 8), random(2, kv_heads, length, 8)
    turn, module = torch.randn(8, 8, dtype=torch.float64), Identity(heads, kv_heads, cells)
    reading = len(module.query_heads)
    # What undoes rotations does something else here, to queries alone.
    monkeypatch.setattr(
        "photon_train.models.memory_segment_photon.unrotate",
        lambda states, *_: states @ turn if states.shape[1] == reading and states.shape[2] == length else states,
    )
    if kv_heads == heads:  # the two cannot be told apart by their shape then
        turn = torch.eye(8, dtype=torch.float64)
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True) if has_sinks else None
    found = segment(length, window, chunk, num_sinks).attend(module, query, key, value, 0.3, softcap, sinks)
    token = torch.arange(length)
    start = token - window + 1
    start = (start - start % chunk).clamp(min=0)[:, None]
    near_seen = (token <= token[:, None]) & ((token >= start) | (token < num_sinks))
    far_seen = (token < start) & (token >= num_sinks)
    keys, values = (states.repeat_interleave(heads // kv_heads, dim=1) for states in (key, value))
    scores = torch.cat([query @ keys.transpose(2, 3), (query @ turn) @ keys.transpose(2, 3)], dim=3) * 0.3
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    reads = torch.tensor([head in module.query_heads for head in range(heads)])[:, None, None]
    seen = torch.cat([near_seen.expand(heads, -1, -1), far_seen & reads], dim=2)
    scores = scores.masked_fill(~seen, -torch.inf)
    if has_sinks:  # a key without a value
        scores = torch.cat([scores, sinks[:, None, None].expand(2, heads, length, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : 2 * length]
    expected = weights @ torch.cat([values, values], dim=2)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    upstream, leaves = torch.randn_like(found), (query, key, value, *([sinks] if has_sinks else []))
    gradients = zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    assert all(torch.allclose(mine, theirs, rtol=1e-8, atol=1e-8) for mine, theirs in gradients)


@pytest.mark.parametrize("name", sorted(GRAFTS))
def test_blocks_give_the_loss_and_the_gradients_of_the_whole(name, monkeypatch):
    """Blocks of few queries, so that windows, sinks and units reach over their edges, and sets of few far keys; an odd
    length, two rows."""
    model, ids, results = photon_model(name).train(), tokens(2, 47), []
    for size in (128, 4):
        monkeypatch.setattr("photon_train.models.segments_photon.BLOCK", size)
        monkeypatch.setattr("photon_train.models.memory_segment_photon.MOST_SCORES", 6 * size)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (whole, expected), (loss, found) = results
    assert torch.allclose(loss, whole, rtol=1e-5) and found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


@pytest.fixture
def gradients_on_the_cpu(monkeypatch):
    """PyTorch has the uncompiled backward pass on the CPU, but refuses it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *states: None)


@pytest.mark.parametrize(
    "name", ["memory", "memory-many-sinks", "memory-apart", "memory-4-bits", "window", "memory-full"]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_fused_kernel_gives_the_loss_and_gradients_of_the_blocks(name, gradients_on_the_cpu):
    model, ids, results = photon_model(name).train(), tokens(2, 47), []
    for fused in ("no", "yes"):
        model.set_fused_windows(fused)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, expected), (fused_loss, found) = results
    assert torch.allclose(fused_loss, loss, rtol=1e-5) and found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


@pytest.mark.parametrize("window, chunk, num_sinks, units", [(64, 1, 0, 0), (200, 16, 3, 37), (300, 4, 150, 90)])
def test_listed_blocks_are_those_that_are_seen(window, chunk, num_sinks, units):
    size, index = flex_photon.BLOCK, torch.arange(5 * flex_photon.BLOCK + 17)
    starts = (index - window + 1).clamp(min=0) // chunk * chunk
    ends = (torch.arange(units) + 1) * 6 if units else None
    mask = flex_photon.window_mask(starts, index, num_sinks, ends)
    blocks = mask.visible().unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(2)
    count, listed = mask.block_mask.full_kv_num_blocks[0, 0], mask.block_mask.full_kv_indices[0, 0]
    full = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    for row in range(len(full)):
        full[row, listed[row, : count[row]].long()] = True
    assert torch.equal(full, blocks.all(2))
    listed = mask.block_mask.to_dense()[0, 0].bool()
    assert torch.equal(listed | full, listed) and not (blocks.any(2) & ~listed).any()
    # What is listed and not seen is little: bounds per block are not exact at the edges.
    assert int((listed & ~blocks.any(2)).sum()) <= len(full)


def test_the_number_of_blocks_is_linear_in_the_length():
    index = torch.arange(8192)
    mask = flex_photon.window_mask((index - 63).clamp(min=0), index, 4)
    assert int(mask.block_mask.kv_num_blocks.max()) <= 3 and not mask.block_mask.full_kv_num_blocks.any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_fused_kernel_is_trusted_only_if_it_gives_the_softmax(monkeypatch, caplog, gradients_on_the_cpu):
    def wrong(query, key, value, **settings):
        return flex_photon.flex_attention(query, key, value, **{**settings, "scale": settings["scale"] * 1.1})

    def broken(*states, **settings):
        raise RuntimeError("no compiler")

    shape = torch.device("cpu"), torch.float32, 2, 16
    for function, expected in ((flex_photon.flex_attention, ""), (wrong, "is off by"), (broken, "(no compiler)")):
        monkeypatch.setattr(flex_photon, "compiled", lambda function=function: function)
        caplog.clear()
        assert flex_photon.is_usable.__wrapped__(*shape) == (not expected)
        assert expected in caplog.text


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_kernel_is_tried_on_two_sizes(monkeypatch, gradients_on_the_cpu):
    sizes = []

    def seen(query, *states, **settings):
        sizes.append((query.shape[0], query.shape[2]))
        wrong = len(sizes) == 2
        return flex_photon.flex_attention(query, *states, **settings) * (1.1 if wrong else 1)

    monkeypatch.setattr(flex_photon, "compiled", lambda: seen)
    assert not flex_photon.is_usable.__wrapped__(torch.device("cpu"), torch.float32, 2, 16)
    assert sizes == [(1, 256), (3, 512)]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_kernel_can_be_tried_first_in_a_checkpointed_layer(monkeypatch, caplog, gradients_on_the_cpu):
    """As a probe's first pass does on a GPU: the trial's own tensors are not the layer's."""
    monkeypatch.setattr(flex_photon, "compiled", lambda: flex_photon.flex_attention)
    tried = []

    def layer(states):
        if not tried:
            tried.append(flex_photon.is_usable.__wrapped__(torch.device("cpu"), torch.float32, 2, 16))
        return (states.sin() * states).exp()

    states = torch.randn(3, 4, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, states, use_reentrant=False).sum().backward()
    (expected,) = torch.autograd.grad((states.sin() * states).exp().sum(), states)
    assert tried == [True] and not caplog.text
    torch.testing.assert_close(states.grad, expected)


@pytest.mark.slow
def test_layers_with_other_cells_and_documents_of_other_lengths_are_compiled_together():
    """What is compiled anew takes seconds on a GPU: far keys make a difference, and sizes that are equal by chance."""
    graphs = []
    torch._dynamo.reset()
    function = torch.compile(
        flex_photon.flex_attention, dynamic=True, backend=lambda module, _: graphs.append(1) or module
    )
    for batch, kv_heads, length, units in (
        *((batch, kv_heads, length, 0) for batch, length in ((1, 700), (3, 900)) for kv_heads in (2, 3, 5)),
        *((batch, kv_heads, length, length // 3) for batch, length in ((1, 515), (2, 640)) for kv_heads in (2, 3, 5)),
    ):
        query, key, value = (torch.randn(batch, heads, length, 16) for heads in (4 * kv_heads, kv_heads, kv_heads))
        far = tuple(torch.randn(batch, kv_heads, 2 * units, 16) for _ in range(2)) if units else None
        index = torch.arange(length)
        ends = flex_photon.far_ends(units, 2, 4, query.device) if units else None
        mask = flex_photon.window_mask((index - 63).clamp(min=0), index, 4, ends)
        flex_photon.attend_fused(query, key, value, mask, 0.25, far, function)
    torch._dynamo.reset()
    assert len(graphs) <= 4


def test_windows_are_blockwise_on_the_cpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr("photon_train.models.segments_photon.attend_window", lambda *arguments: pytest.fail("fused"))
    model, ids = photon_model("window").train(), tokens(1, 20)
    model(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="fused='flex' is not one of auto, yes, no"):
        model.set_fused_windows("flex")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries, head_dim", [(4, 64), (1, 128)])
def test_the_compiled_kernel_works_on_a_gpu(queries, head_dim, dtype):
    assert flex_photon.is_usable(torch.device("cuda", 0), dtype, queries, head_dim)
