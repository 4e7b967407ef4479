"""The probe of cells: against finite differences, transformers' own attention and models whose answer is known."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY
from tiny_probe import GROUPS, HEADS, LAYERS, SINKS, SIZE, WINDOW, own_text, quieten, sharp_dense

from photon_train.conversion import cells
from photon_train.conversion.cells import CellProbe, ProbedLoss, ProbeText, probe_cells, summed_loss
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.errors import PhotonError

LOCAL = {"use_sliding_window": True, "sliding_window": 9}
LOCAL["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]


def probe(model, *texts: ProbeText, **options) -> CellProbe:
    return probe_cells(model, texts, WINDOW, SINKS, **options)


@torch.no_grad()
def mean_loss(model, text: ProbeText, gates: dict[int, torch.Tensor], layers=range(LAYERS)) -> float:
    segments = DenseAttention(text.tokens).restricted(model.config, WINDOW, SINKS, layers, gates)
    return summed_loss(model, text.tokens, text.targets, segments) / text.targets[:, 1:].sum().item()


def in_double(model):
    """The model in fp64 throughout: transformers' norms go through fp32."""
    for name, norm in list(model.named_modules()):
        if name.endswith("norm"):
            exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon)
            exact.load_state_dict(norm.state_dict())
            model.set_submodule(name, exact)
    return model.double()


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {}), ("qwen2", LOCAL), ("qwen3", {})])
def test_gradients_are_those_of_finite_differences(family: str, changes: dict) -> None:
    model = in_double(sharp_dense(family, **changes))
    layers = [0, 2] if changes else [0, 1, 2]
    text, step = own_text(model), 1e-4
    found = probe(model, text, layers=layers, gate=0.3).losses["text"]
    for layer in range(LAYERS):
        for head in range(HEADS):
            if layer not in layers:
                assert found.gradients[layer][head] == 0
                continue
            ends = []
            for sign in (1, -1):
                gates = {each: torch.full((HEADS,), 0.3, dtype=torch.double) for each in layers}
                gates[layer][head] += sign * step
                ends.append(mean_loss(model, text, gates, layers))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope) > 1e-6
            assert found.gradients[layer][head] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_gate_mixes_the_output_of_its_own_cell() -> None:
    """What the first layer's output projection reads, against both kinds of attention mixed by hand."""
    model, text = sharp_dense(), own_text(sharp_dense())
    read = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    mean_loss(model, text, {0: torch.ones(HEADS)})
    mean_loss(model, text, {0: torch.zeros(HEADS)})
    mean_loss(model, text, {0: torch.tensor([0.25, 1.0])})
    far, near, mixed = (states.unflatten(-1, (HEADS, GROUPS * SIZE)) for states in read)
    assert not torch.allclose(far, near, atol=1e-2)
    torch.testing.assert_close(mixed[..., 0, :], 0.25 * far[..., 0, :] + 0.75 * near[..., 0, :])
    torch.testing.assert_close(mixed[..., 1, :], far[..., 1, :])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_ends_are_transformers_own_windows(family: str) -> None:
    """The dense model and, for a family that has one, its own sliding window."""
    model = sharp_dense(family)
    text = own_text(model)
    found = probe_cells(model, [text], WINDOW, num_sinks=0).losses["text"]
    gates = {layer: torch.ones(HEADS) for layer in range(LAYERS)}
    assert mean_loss(model, text, gates) == pytest.approx(found.dense, abs=1e-5)
    model.set_attn_implementation("sdpa")
    for window, loss in ((None, found.dense), *(((WINDOW, found.restricted),) if family == "mistral" else ())):
        if window is not None:
            model.config.sliding_window = window
        logits = model(input_ids=text.tokens, use_cache=False).logits[:, WINDOW:-1]
        wanted = F.cross_entropy(logits.flatten(0, 1), text.tokens[:, WINDOW + 1 :].flatten()).item()
        assert loss == pytest.approx(wanted, abs=1e-5)


def test_a_bound_of_the_logits_is_in_the_losses() -> None:
    """Gemma 2's, which the probe's pieces of logits have to get: against transformers' own logits."""
    model = sharp_dense("gemma2")
    text = own_text(model)
    found = probe(model, text, layers=[1]).losses["text"]
    model.set_attn_implementation("eager")
    logits = model(input_ids=text.tokens, use_cache=False).logits[:, WINDOW:-1]
    assert 1 < logits.abs().max() < model.config.final_logit_softcapping
    wanted = F.cross_entropy(logits.flatten(0, 1), text.tokens[:, WINDOW + 1 :].flatten()).item()
    assert found.dense == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("loud", [(0, 1), (1, 0), (2, 1)])
def test_the_cell_that_carries_far_attention_comes_first(loud: tuple[int, int]) -> None:
    model = sharp_dense()
    quieten(model, loud)
    found = probe(model, own_text(model, count=8))
    assert found.best_cells(1) == {loud[0]: [loud[1]]}
    scores = found.scores
    best = scores[loud[0]][loud[1]]
    assert best == pytest.approx(1, abs=0.5)
    others = [scores[i][j] for i in range(LAYERS) for j in range(HEADS) if (i, j) != loud]
    assert best > 10 * max(map(abs, others))


def test_layers_left_alone_are_neither_restricted_nor_ranked() -> None:
    """Those that a family keeps local, and those that stay at full attention."""
    model = sharp_dense("qwen2", **LOCAL)
    text = own_text(model)
    found = probe(model, text, layers=[2]).losses["text"]
    assert found.gradients[:2] == [[0.0] * HEADS] * 2 and all(found.gradients[2])
    assert found.restricted == pytest.approx(mean_loss(model, text, {}, layers=[2]), abs=1e-5)
    # The family's own window of 9 is wider: restricting its layer too would be another loss.
    assert abs(found.restricted - mean_loss(model, text, {}, layers=[1, 2])) > 1e-4


def test_the_probe_runs_in_the_models_type_and_leaves_it_as_it_was() -> None:
    model = sharp_dense(dtype=torch.bfloat16).train()
    model.lm_head.weight.requires_grad_(False)
    exact = probe(sharp_dense(), text := own_text(sharp_dense()))
    found, types = [], set()
    hook = model.model.layers[0].register_forward_hook(lambda *args: types.add(args[-1].dtype))
    found = probe(model, text)
    hook.remove()
    assert types == {torch.bfloat16}
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(exact.scores), atol=0.05, rtol=0.1)
    assert model.training and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    learned = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert learned == {"lm_head.weight"} and all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_the_losses_of_a_model_in_16_bits_have_all_digits() -> None:
    model = sharp_dense(dtype=torch.bfloat16)
    text = own_text(model)
    found = summed_loss(model, text.tokens, text.targets, (segments := DenseAttention(text.tokens).dense(model.config)))
    logits = model(input_ids=text.tokens, use_cache=False, photon_segments=segments).logits
    chosen, wanted = logits[:, :-1][text.targets[:, 1:]], text.tokens[:, 1:][text.targets[:, 1:]]
    assert logits.dtype == torch.bfloat16
    assert found == pytest.approx(F.cross_entropy(chosen.double(), wanted, reduction="sum").item(), rel=1e-5)


def test_memory_is_bounded(monkeypatch) -> None:
    """Layers are computed again instead of kept, logits are never held whole, and neither changes a value."""
    model, text = sharp_dense(), own_text(sharp_dense(), count=2)
    whole, calls, sizes = probe(model, text), [], []
    monkeypatch.setattr(cells, "LOGIT_CHUNK", VOCABULARY * 5)
    # States pass the head once as they are, of another width.
    model.lm_head.register_forward_hook(
        lambda module, inputs, out: sizes.append(out.shape[:-1].numel()) if out.shape[-1] == VOCABULARY else None
    )
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    pieces = probe(model, text)
    assert max(sizes) == 5 and calls == [1, 1, 1, 1] * 2
    assert torch.tensor(pieces.scores).allclose(torch.tensor(whole.scores), atol=1e-6)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    calls.clear()
    kept = probe(model, text)
    assert calls == [1, 1, 1] * 2
    assert torch.tensor(kept.scores).allclose(torch.tensor(whole.scores), atol=1e-6)


def test_progress_counts_work_before_it_is_done() -> None:
    model, passes = sharp_dense(), []
    texts = own_text(model, count=1), own_text(model, count=2, length=30, name="more")
    probe(model, *texts, on_pass=lambda done, total: passes.append((done, total)))
    assert len(passes) == 9 and passes[0][0] == 40 and {total for _, total in passes} == {passes[-1][0]}


def test_losses_that_the_window_does_not_touch_have_no_say() -> None:
    model = sharp_dense()
    text = own_text(model)
    near = ProbeText("near", text.tokens, (torch.arange(40) < WINDOW).expand(4, -1))
    both, alone = probe(model, text, near), probe(model, text)
    assert both.losses["near"].cost == pytest.approx(0, abs=1e-6) and set(both.counted) == {"text"}
    assert both.scores == alone.scores
    title = " ".join(both.table().title.split())
    assert "near" in title and "(costs nothing: left out)" in title
    nothing = probe(model, near)
    assert nothing.scores == [[0.0] * HEADS] * LAYERS and nothing.table().row_count == 0
    with pytest.raises(PhotonError, match="nothing that a window of 6 tokens costs this model on near"):
        nothing.best_cells(1)


def test_the_first_token_of_a_sequence_is_never_predicted() -> None:
    model = sharp_dense()
    text = own_text(model, count=2)
    marked = ProbeText(text.name, text.tokens, text.targets | (torch.arange(40) == 0))
    assert probe(model, marked) == probe(model, text)


def test_a_cost_within_its_noise_does_not_count() -> None:
    cases = {(0.1, 0.04): True, (0.1, 0.06): False, (0.1, 0.0): True, (-0.1, 0.0): False}
    for (cost, error), counts in cases.items():
        assert ProbedLoss(3.0, 3.0 + cost, error, [[0.0]]).counts == counts
    texts = {count: own_text(sharp_dense(), count=count) for count in (1, 4)}
    assert probe(sharp_dense(), texts[1]).losses["text"].error == 0
    found = probe(sharp_dense(), texts[4]).losses["text"]
    alone = [
        probe(sharp_dense(), ProbeText("text", *(each[row : row + 1] for each in (texts[4].tokens, texts[4].targets))))
        for row in range(4)
    ]
    costs = torch.tensor([each.losses["text"].cost for each in alone])
    assert found.cost == pytest.approx(costs.mean().item(), abs=1e-5)
    assert found.error == pytest.approx((costs.std() / 2).item(), rel=1e-3)


LOSSES = {
    "text": ProbedLoss(3.0, 3.2, 0.01, [[-0.02, 0.0], [-0.1, -0.04], [0.0, 0.0]]),
    "needles": ProbedLoss(0.5, 2.5, 0.1, [[0.0, -1.0], [-0.2, 0.1], [0.0, 0.0]]),
}


def test_scores_are_mean_shares_and_cells_are_ranked_by_them() -> None:
    found = CellProbe(64, 4, LOSSES)
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor([[0.05, 0.25], [0.3, 0.075], [0.0, 0.0]]))
    assert found.best_cells(1) == {1: [0]} and found.best_cells(2) == {0: [1], 1: [0]}
    assert found.best_cells(4) == {0: [0, 1], 1: [0, 1]} and list(found.best_cells(2)) == [0, 1]
    assert found.best_cells(2, among=[1, 2]) == {1: [0, 1]}
    table = found.table()
    assert [column.header for column in table.columns] == ["Layer", "Head", "wins back", "text", "needles"]
    assert [next(iter(column.cells)) for column in table.columns] == ["1", "0", "30.0%", "50.0%", "10.0%"]


def test_a_probe_is_json_and_back() -> None:
    found = CellProbe(64, 4, LOSSES)
    assert CellProbe.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["scores"] == found.scores
    for damaged in ("", "[]", "{}", '{"losses": {"text": {"dense": 1}}}', '{"losses": {}}'):
        with pytest.raises(PhotonError, match="not a probe of cells"):
            CellProbe.from_json(damaged)


def test_text_that_says_nothing_is_refused() -> None:
    model, text = sharp_dense(), own_text(sharp_dense())
    with pytest.raises(PhotonError, match=r"more than 41 tokens, and those of text are 4 of 40: raise train.seq_len"):
        probe_cells(model, [text], 40)
    with pytest.raises(PhotonError, match="those of text are 0 of 40"):
        probe(model, ProbeText("text", text.tokens[:0], text.targets[:0]))
    with pytest.raises(PhotonError, match="predicts no token of text"):
        probe(model, ProbeText("text", text.tokens, torch.arange(40).expand(4, -1) == 0))
    with pytest.raises(PhotonError, match="at least one kind"):
        probe(model)
