"""Training memory is linear in the length: what autograd holds, and the largest tensor that is ever made."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY
from tiny_training import tiny_data, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from photon_train.config import DistillSettings, LoraSettings
from photon_train.training import heads
from photon_train.training.loop import enable_checkpointing
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective, num_target_tokens

SHORT, LONG = 768, 3072


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def _step(name: str, length: int, distill: float, checkpointing: bool) -> tuple[int, int]:
    """Bytes that one step holds for its backward pass, and those of its largest tensor."""
    model = add_lora(tiny_model(name), LoraSettings(rank=4))
    if checkpointing:
        enable_checkpointing(model)
    objective = TrainingObjective(model, DistillSettings(distill, hidden_weight=distill)).train()
    batch = tiny_data(1, seq_len=length).batch(torch.arange(1))
    counts = {"target_tokens": num_target_tokens(batch["labels"]), "sequences": torch.tensor(1)}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _Largest() as largest:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(**batch, **counts)["total"]
        loss.backward()
    return sum(held.values()), largest.bytes


@pytest.mark.parametrize(
    "name, distill, checkpointing",
    [
        ("llama", 0.0, False),
        ("memory", 0.5, False),
        ("memory-full", 0.5, True),
        ("stream-2", 0.0, False),
        ("block-2", 0.0, True),
    ],
)
def test_four_times_the_text_takes_four_times_the_memory(name, distill, checkpointing, monkeypatch):
    """The teacher's pass at full attention and the vocabulary losses included; no matrix of length x length is made."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 128 * VOCABULARY)
    (short, _), (long, largest) = (_step(name, length, distill, checkpointing) for length in (SHORT, LONG))
    assert long <= 1.01 * short * LONG / SHORT
    assert largest < LONG * LONG / 2, "bytes: an eighth of the matrix in fp32"
