"""The layer probe against the models it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import base_config, shake
from transformers import AutoConfig, AutoModelForCausalLM

from photon_train.conversion import probe as probe_module
from photon_train.conversion.probe import LayerProbe, probe_layers
from photon_train.errors import PhotonError


def dense(family: str):
    settings = base_config(family)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return shake(AutoModelForCausalLM.from_config(config, attn_implementation="photon")).eval()


def far_loss(model, tokens: torch.Tensor, window: int) -> float:
    logits = model(input_ids=tokens, use_cache=False).logits[:, window:-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, window + 1 :].flatten()).item()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_probe_equals_transformers_own_windows(family: str) -> None:
    """The ends of the probe are the dense model and, for a family that has one, its own sliding window."""
    model, tokens = dense(family), torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    passes = []
    probe = probe_layers(model, [tokens], window=6, num_sinks=0, on_pass=lambda done, total: passes.append(total))
    model.set_attn_implementation("sdpa")
    assert probe.dense == pytest.approx(far_loss(model, tokens, 6), abs=1e-5)
    assert passes == [8] * 8 and len(probe.alone) == len(probe.kept) == 3
    assert len({round(loss, 6) for loss in (probe.dense, probe.restricted, *probe.alone, *probe.kept)}) == 8
    if family == "mistral":
        model.config.sliding_window = 6
        assert probe.restricted == pytest.approx(far_loss(model, tokens, 6), abs=1e-5)


def test_logits_of_a_whole_sequence_are_never_held(monkeypatch) -> None:
    """At a vocabulary of 128k they would take more memory than the training that the probe precedes."""
    model, tokens = dense("llama"), torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    whole, sizes = probe_layers(model, [tokens], window=6), []
    monkeypatch.setattr(probe_module, "LOGIT_CHUNK", 61 * 5)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    pieces = probe_layers(model, [tokens], window=6)
    assert max(sizes) == 61 * 5
    assert (pieces.dense, *pieces.alone) == pytest.approx((whole.dense, *whole.alone), abs=1e-5)


def test_a_window_over_everything_costs_nothing() -> None:
    model, tokens = dense("llama"), torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    near, wide = (probe_layers(model, [tokens], window=window, num_sinks=2) for window in (6, 38))
    for loss in (wide.restricted, *wide.alone, *wide.kept):
        assert loss == pytest.approx(wide.dense, abs=1e-5)
    assert near.restricted != pytest.approx(near.dense, abs=1e-3)


def test_layers_are_ranked_by_what_is_lost_without_them() -> None:
    probe = LayerProbe(64, 4, 3.0, 3.5, alone=(3.0, 3.2, 3.1), kept=(3.4, 3.1, 3.6))
    assert probe.best_layers(1) == [1] and probe.best_layers(2) == [1, 2]
    assert probe.best_layers(1, among=[0, 2]) == [2]
    assert probe.recovered == pytest.approx((0.2, 0.8, -0.2))


def test_short_text_is_refused() -> None:
    with pytest.raises(PhotonError, match="more than 65 tokens"):
        probe_layers(dense("llama"), [torch.zeros(1, 40, dtype=torch.long)], window=64)
