"""Which dense layers need their far attention: a zero-shot probe (DESIGN 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import PreTrainedModel

from photon_train.accounting.memory import LOGIT_CHUNK
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.errors import PhotonError


@dataclass(frozen=True)
class LayerProbe:
    """Mean cross-entropies in nats per token, beyond the window.

    Attributes:
        window: Tokens that a restricted layer looks back on.
        num_sinks: First tokens that stay visible to it.
        dense: Of the dense model.
        restricted: With every layer restricted to the window.
        alone: Per layer, with this layer alone restricted.
        kept: Per layer, with all layers but this one restricted.
    """

    window: int
    num_sinks: int
    dense: float
    restricted: float
    alone: tuple[float, ...]
    kept: tuple[float, ...]

    @property
    def recovered(self) -> tuple[float, ...]:
        """Per layer, the share of the window's loss that it wins back alone (0 where the window costs nothing)."""
        cost = self.restricted - self.dense
        return tuple((self.restricted - kept) / cost if cost > 0 else 0.0 for kept in self.kept)

    def best_layers(self, count: int, among: Iterable[int] | None = None) -> list[int]:
        """The `count` layers (of `among`) whose far attention is missed most, in order of their depth.

        Ranked by what restricting each alone costs: layers of one circuit (retrieval takes two) help only together,
        so that one of them kept alone may win nothing back.
        """
        ranked = sorted(range(len(self.alone)) if among is None else among, key=lambda layer: -self.alone[layer])
        return sorted(ranked[:count])

    def table(self) -> Table:
        """The probe for a screen."""
        title = f"Far attention, window {self.window}: dense {self.dense:.4f}, all restricted {self.restricted:.4f}"
        table = Table(title=title)
        for column in ("Layer", "restricted alone: loss rises by", "kept alone: loss falls by", "recovers"):
            table.add_column(column, justify="right")
        for layer, (alone, kept) in enumerate(zip(self.alone, self.kept, strict=True)):
            changes = (f"{alone - self.dense:+.4f}", f"{kept - self.restricted:+.4f}", f"{self.recovered[layer]:.0%}")
            table.add_row(str(layer), *changes)
        return table


@torch.no_grad()
def probe_layers(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    window: int,
    num_sinks: int = 4,
    on_pass: Callable[[int, int], None] | None = None,
) -> LayerProbe:
    """Probe every layer of a dense model, without training.

    Args:
        model: Dense causal LM, loaded with ``attn_implementation="photon"``.
        batches: Token ids ``[B, T]`` of real text, T > window.
        window: Tokens that a restricted layer looks back on.
        num_sinks: First tokens that stay visible.
        on_pass: Called with the passes done and their number.

    Raises:
        PhotonError: if the sequences are not longer than the window.
    """
    batches = [batch.to(model.device) for batch in batches]
    if not batches or min(batch.shape[1] for batch in batches) <= window + 1:
        raise PhotonError(f"the probe needs sequences of more than {window + 1} tokens: raise the length of the text")
    layers = range(model.config.num_hidden_layers)
    everything = frozenset(layers)
    kinds = [frozenset(), everything, *({layer} for layer in layers), *(everything - {layer} for layer in layers)]
    was_training = model.training
    model.eval()
    losses = []
    for done, restricted in enumerate(kinds, start=1):
        losses.append(_loss(model, batches, window, num_sinks, restricted))
        if on_pass is not None:
            on_pass(done, len(kinds))
    model.train(was_training)
    count = len(layers)
    return LayerProbe(window, num_sinks, losses[0], losses[1], tuple(losses[2 : 2 + count]), tuple(losses[2 + count :]))


def _loss(model, batches: list[torch.Tensor], window: int, num_sinks: int, restricted: Collection[int]) -> float:
    total = count = 0
    head = model.get_output_embeddings()
    rows = max(1, LOGIT_CHUNK // model.config.vocab_size)  # the logits of whole sequences are never held
    for tokens in batches:
        attention = DenseAttention(tokens)
        full, near = attention.full(), attention.window(window, num_sinks)
        segments = [near if layer in restricted else full for layer in range(model.config.num_hidden_layers)]
        states = model.base_model(input_ids=tokens, use_cache=False, photon_segments=segments).last_hidden_state
        far, targets = states[:, window:-1].flatten(0, 1), tokens[:, window + 1 :].flatten()
        for piece, target in zip(far.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(head(piece).float(), target, reduction="sum").item()
        count += targets.numel()
    return total / count
