"""The objective: each part against a plain formula, and one big batch against the same sequences in pieces."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, shake
from tiny_training import tiny_data, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from photon_train.config import ConsistencySettings, DistillSettings, LoraSettings
from photon_train.errors import PhotonError
from photon_train.training import heads
from photon_train.training.heads import IGNORED, vocabulary_losses
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective, hidden_error, num_target_tokens

LORA = LoraSettings(rank=4, alpha=8)


def _plain_kl(student, teacher, labels, temperature):
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    p, q = (torch.log_softmax(logits.double() / temperature, -1) for logits in (teacher, student))
    return ((p.exp() * (p - q)).sum(-1) * target).sum() * temperature**2


def _plain_hidden(student, teacher, labels):
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    student, teacher = student.double(), teacher.double()
    return (((student - teacher) ** 2).sum(-1) / (teacher**2).sum(-1) * target).sum()


def _last_hidden(model, input_ids, **settings):
    """What the head of `model` reads."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids, **settings)
    handle.remove()
    return seen[0]


def _example(sequences: int = 4) -> dict[str, torch.Tensor]:
    return tiny_data(sequences).batch(torch.arange(sequences))


def _trained(name: str) -> torch.nn.Module:
    """A model whose adapters and new modules differ from the frozen weights."""
    model = add_lora(tiny_model(name), LORA)
    moved = shake(add_lora(tiny_model(name), LORA), seed=4).state_dict()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * (moved[key] - parameter))
    return model


@pytest.mark.parametrize("name", ["memory", "memory-full"])
def test_every_part_of_the_loss_holds_documents_apart(name):
    """Student and teacher: what stands in another document changes no part of one document's loss, nor a gradient."""
    batch, found = tiny_data(2, documents=True).batch(torch.arange(2)), []
    assert (batch["position_ids"][1] == 0).sum() > 3
    first = int((batch["position_ids"][1] == 0).nonzero()[2])
    batch["labels"][0], batch["labels"][1, first:] = IGNORED, IGNORED
    for token in (5, 9):
        batch["input_ids"][1, first:] = token
        model = _trained(name)
        objective = TrainingObjective(model, DistillSettings(weight=0.5, hidden_weight=0.5)).train()
        one = torch.ones((), dtype=torch.long)
        parts = objective(**batch, target_tokens=one, sequences=one)
        parts["total"].backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((parts, gradients))
    (parts, gradients), (other_parts, other_gradients) = found
    assert set(parts) == {"total", "ce", "distill", "distill_hidden"} and parts["distill"] > 0
    assert all(torch.equal(parts[key], other_parts[key]) for key in parts)
    assert all(torch.equal(gradients[key], other_gradients[key]) for key in gradients)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunks", [1, 5, 72])
def test_kl_and_its_gradient_equal_the_formula(temperature, chunks):
    batch = _example(3)
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 24, VOCABULARY, generator=generator)
    student.requires_grad_()
    expected = _plain_kl(student, teacher, batch["labels"], temperature)
    (gradient,) = torch.autograd.grad(expected, student)
    same = nn.Identity()
    _, value = vocabulary_losses(same, student, batch["labels"], (same, teacher), temperature, chunks)
    value.backward()
    assert torch.allclose(value.double(), expected, rtol=1e-5)
    assert torch.allclose(student.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, None), (torch.float32, 1.5)])
def test_losses_are_those_of_the_logits_in_double(dtype, bound):
    """Of logits in 16 bits, which are summed up more finely, and of bounded ones (Gemma 2), the teacher's too."""
    batch, generator = _example(3), torch.Generator().manual_seed(2)
    heads_of = [nn.Linear(8, VOCABULARY, bias=False).to(dtype) for _ in range(2)]
    states = torch.randn(2, 3, 24, 8, generator=generator).to(dtype) * 4
    ce, kl = vocabulary_losses(heads_of[0], states[0], batch["labels"], (heads_of[1], states[1]), 2.0, bound=bound)
    logits = [head(each).double() for head, each in zip(heads_of, states, strict=True)]
    if bound is not None:
        assert all(each.abs().max() > bound for each in logits)
        logits = [bound * (each / bound).tanh() for each in logits]
    student, teacher = logits
    expected = F.cross_entropy(student[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert ce.dtype == kl.dtype == torch.float32
    assert ce.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl.item() == pytest.approx(_plain_kl(student, teacher, batch["labels"], 2.0).item(), rel=1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunks", [1, 7])
def test_cross_entropy_in_chunks_has_the_gradients_of_one_piece(trained, chunks):
    """Of the states, and of the head where it is trained."""
    batch = _example(3)
    head = nn.Linear(8, 61, bias=False).requires_grad_(trained)
    states = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logits = head(states)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    wanted = [states, head.weight] if trained else [states]
    gradients = torch.autograd.grad(expected, wanted)
    ce, kl = vocabulary_losses(head, states, batch["labels"], chunks=chunks)
    assert torch.allclose(ce, expected) and kl == 0
    for found, gradient in zip(torch.autograd.grad(ce, wanted), gradients, strict=True):
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, weight", [("llama", 0.0), ("memory", 0.0), ("memory", 0.5)])
def test_the_logits_of_a_sequence_are_never_held(name, weight, monkeypatch):
    """The largest tensor that is made, forward and backward, is one chunk's logits; the loss is that of one piece."""
    length, rows = 512, 64
    batch = tiny_data(1, seq_len=length).batch(torch.arange(1))
    objective = TrainingObjective(_trained(name), DistillSettings(weight=weight)).train()
    counts = {"target_tokens": num_target_tokens(batch["labels"]), "sequences": torch.tensor(1)}
    whole = objective(**batch, **counts)
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", rows * VOCABULARY)
    seen = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                    seen.add(tensor.numel() // VOCABULARY)
            return out

    with Sizes():
        parts = objective(**batch, **counts)
        parts["total"].backward()
    assert max(seen) == rows
    for key, value in parts.items():
        assert torch.allclose(value, whole[key], rtol=1e-5), key


def test_cross_entropy_may_be_left_to_the_teacher():
    batch = _example()
    counts = {"target_tokens": num_target_tokens(batch["labels"]), "sequences": torch.tensor(len(batch["input_ids"]))}
    model = _trained("memory")
    both, alone = (
        TrainingObjective(model, DistillSettings(weight=0.5, ce_weight=weight)).train()(**batch, **counts)
        for weight in (2.0, 0.0)
    )
    assert both["distill"] > 0 and both["ce"] == alone["ce"] > 0
    torch.testing.assert_close(alone["total"], 0.5 * both["distill"])
    torch.testing.assert_close(both["total"], 2 * both["ce"] + 0.5 * both["distill"])
    with pytest.raises(ValueError, match="distill.ce_weight is 0 and nothing else is learnt"):
        DistillSettings(ce_weight=0.0)


def test_liger_takes_over_where_it_can_run(monkeypatch):
    """On a GPU with a plain head; never for a head that is sharded or has an adapter."""
    states = torch.randn(4, 8)
    plain = nn.Linear(8, 11, bias=False)
    assert heads.fused_cross_entropy(plain, states) is None, "not on a CPU"
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    made = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=lambda **settings: settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", made)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", made)
    assert heads.fused_cross_entropy(plain, on_gpu) == {"ignore_index": -100, "reduction": "sum"}
    assert heads.fused_cross_entropy(plain.bfloat16(), on_gpu) is None
    plain = plain.float()
    plain.weight.ds_id = 3
    assert heads.fused_cross_entropy(plain, on_gpu) is None
    settings = LoraSettings(rank=2, target_modules=["q_proj", "lm_head"])
    adapted = add_lora(tiny_model("llama"), settings).get_base_model().get_output_embeddings()
    assert heads.fused_cross_entropy(adapted, on_gpu) is None


def test_an_adapter_on_the_head_is_trained_and_the_teacher_has_none():
    settings = LoraSettings(rank=4, alpha=8, target_modules=["q_proj", "lm_head"])
    model, batch = add_lora(tiny_model("memory"), settings), _example()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.lora_B" in name:
                parameter.normal_()
        teacher = tiny_model("memory")(batch["input_ids"], as_dense=True).logits
    objective = TrainingObjective(model, DistillSettings(weight=1.0)).train()
    tokens = num_target_tokens(batch["labels"])
    parts = objective(**batch, target_tokens=tokens, sequences=torch.tensor(4))
    logits = model(batch["input_ids"]).logits
    assert torch.allclose(
        parts["distill"].double(), _plain_kl(logits, teacher, batch["labels"], 1.0) / tokens, rtol=1e-4
    )
    parts["total"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head.lora" in name)


@pytest.mark.parametrize("name", ["llama", "memory"])
def test_cross_entropy_is_the_mean_over_target_tokens(name):
    model, batch = tiny_model(name), _example()
    logits = model(batch["input_ids"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    parts = TrainingObjective(model)(
        **batch, target_tokens=num_target_tokens(batch["labels"]), sequences=torch.tensor(4)
    )
    assert parts.keys() == {"total", "ce"}
    assert torch.allclose(parts["total"], expected) and torch.allclose(parts["ce"], expected)


def test_the_models_own_dense_function_teaches_with_adapters_off():
    dense = tiny_model("memory")
    batch = _example()
    with torch.no_grad():
        teacher = dense(batch["input_ids"], as_dense=True).logits
    model = _trained("memory")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    objective = TrainingObjective(model, DistillSettings(weight=0.5, temperature=2.0)).train()
    tokens = num_target_tokens(batch["labels"])
    parts = objective(**batch, target_tokens=tokens, sequences=torch.tensor(4))
    expected = _plain_kl(model(batch["input_ids"]).logits, teacher, batch["labels"], 2.0) / tokens
    assert expected > 0.01
    assert torch.allclose(parts["distill"].double(), expected, rtol=1e-4)
    assert torch.allclose(parts["total"], parts["ce"] + 0.5 * parts["distill"])
    # Switching the adapters off and on again leaves the model trainable and in its mode.
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.training and model.get_base_model().training
    parts["total"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["memory", "llama"])
def test_whoever_teaches_runs_without_dropout(name):
    """The student's own dense function, or a model of its own, whatever mode it comes in."""
    model = _trained(name)
    separate = tiny_model("llama").train() if name == "llama" else None
    modes = []
    taught_by = separate or model.get_base_model()
    taught_by.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    objective = TrainingObjective(model, DistillSettings(weight=0.5), teacher=separate).train()
    objective(**_example(), target_tokens=torch.tensor(9), sequences=torch.tensor(4))
    assert modes == ([False] if separate else [True, False])
    assert model.training and model.get_base_model().training


def test_the_hidden_error_is_relative_and_has_the_gradient_of_the_formula():
    labels = _example(3)["labels"]
    labels[1, 5:] = IGNORED
    student, teacher = torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(5))
    student[0, 3] = teacher[0, 3]  # no error: no gradient, and not NaN
    student.requires_grad_()
    expected = _plain_hidden(student, teacher, labels)
    (gradient,) = torch.autograd.grad(expected, student)
    found = hidden_error(student, teacher, labels)
    assert torch.allclose(found.double(), expected)
    assert torch.allclose(torch.autograd.grad(found, student)[0], gradient, rtol=1e-4, atol=1e-6)
    scaled = hidden_error(7 * student, 7 * teacher, labels)
    assert torch.allclose(scaled, found, rtol=1e-4)


def test_the_hidden_error_of_states_in_16_bits_has_all_digits():
    labels = _example(3)["labels"]
    student, teacher = torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    difference = (student - teacher).double()
    expected = _plain_hidden(teacher.double() + difference, teacher, labels)
    found = hidden_error(student, teacher, labels)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_dense_models_last_hidden_states_teach(weight):
    """With and without its logits; the teacher is the dense function with adapters off."""
    batch, model = _example(), _trained("memory")
    with torch.no_grad():
        teacher = _last_hidden(tiny_model("memory"), batch["input_ids"], as_dense=True)
    objective = TrainingObjective(model, DistillSettings(weight, hidden_weight=0.5)).train()
    tokens = num_target_tokens(batch["labels"])
    parts = objective(**batch, target_tokens=tokens, sequences=torch.tensor(4))
    states = _last_hidden(model.get_base_model(), batch["input_ids"])
    expected = _plain_hidden(states, teacher, batch["labels"]) / tokens
    assert expected > 0.01
    assert torch.allclose(parts["distill_hidden"].double(), expected, rtol=1e-4)
    kl = parts["distill"] if weight else torch.zeros(())
    assert ("distill" in parts) == bool(weight)
    assert torch.allclose(parts["total"], parts["ce"] + weight * kl + 0.5 * parts["distill_hidden"])
    parts["total"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert objective.eval()(**batch, target_tokens=tokens, sequences=torch.tensor(4)).keys() == {"total", "ce"}


def test_a_separate_teacher_is_neither_trained_nor_saved():
    teacher, model, batch = tiny_model("llama", seed=3), _trained("block-2"), _example()
    objective = TrainingObjective(model, DistillSettings(weight=1.0), teacher=teacher).train()
    assert not any(p is t for p in objective.parameters() for t in teacher.parameters())
    tokens = num_target_tokens(batch["labels"])
    parts = objective(**batch, target_tokens=tokens, sequences=torch.tensor(4))
    expected = (
        _plain_kl(model(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits, batch["labels"], 1.0) / tokens
    )
    assert torch.allclose(parts["distill"].double(), expected, rtol=1e-4)
    parts["total"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_consistency_is_reported_apart_from_cross_entropy():
    model, batch = tiny_model("block-2"), _example()
    objective = TrainingObjective(model, consistency=ConsistencySettings(weight=0.25)).train()
    parts = objective(**batch, target_tokens=num_target_tokens(batch["labels"]), sequences=torch.tensor(4))
    expected = model(batch["input_ids"], labels=batch["labels"])
    assert expected.consistency_loss > 0.1
    assert torch.allclose(parts["consistency"], expected.consistency_loss)
    assert torch.allclose(parts["total"], expected.loss)
    assert torch.allclose(parts["ce"], expected.loss - 0.25 * expected.consistency_loss)
    assert objective.eval()(
        **batch, target_tokens=num_target_tokens(batch["labels"]), sequences=torch.tensor(4)
    ).keys() == {"total", "ce"}


@pytest.mark.parametrize("name", ["llama", "memory", "block-2"])
def test_pieces_of_a_batch_sum_to_the_batch(name):
    """Unequal target counts, one micro-batch without any target: losses and gradients add up to the big batch's."""
    distill = DistillSettings(weight=0.5, hidden_weight=0.2) if name == "memory" else None
    objective = TrainingObjective(_trained(name), distill, ConsistencySettings(weight=0.3)).train()
    batch = _example(6)
    batch["labels"][2:4] = IGNORED
    counts = {"target_tokens": num_target_tokens(batch["labels"]), "sequences": torch.tensor(6)}
    whole = objective(**batch, **counts)
    whole["total"].backward()
    gradients = {key: p.grad.clone() for key, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    summed: dict[str, torch.Tensor] = {}
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        parts = objective(**{key: value[rows] for key, value in batch.items()}, **counts)
        parts["total"].backward()
        for key, value in parts.items():
            summed[key] = summed.get(key, 0) + value.detach()
    assert summed.keys() == whole.keys()
    for key, value in summed.items():
        assert torch.allclose(value, whole[key], rtol=1e-5), key
    for key, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6), key


def test_distillation_without_a_teacher_is_refused():
    for model in (tiny_model("memory"), add_lora(tiny_model("block-2"), LORA)):
        for settings in (DistillSettings(weight=1.0), DistillSettings(hidden_weight=1.0)):
            with pytest.raises(PhotonError, match="distill.weight or distill.hidden_weight"):
                TrainingObjective(model, settings)
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(PhotonError, match="hidden_weight: a state of the dense model has 64 entries"):
        TrainingObjective(tiny_model("llama"), DistillSettings(hidden_weight=1.0), teacher=wide)
    with pytest.raises(PhotonError, match="99 tokens"):
        TrainingObjective(tiny_model("llama"), DistillSettings(weight=1.0), teacher=tiny_model("llama", vocab_size=99))
