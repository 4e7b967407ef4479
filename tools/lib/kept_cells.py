"""What is left of a dense model when some of its cells alone see beyond the window, and rankings to compare with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel

from photon_train.conversion.cells import CellProbe, ProbedLoss, ProbeText, summed_loss
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.conversion.graft import Cells
from photon_train.evaluation.plots import new_figure, save_figure


class Restriction:
    """A dense model on some text, with parts of it restricted to a window.

    Args:
        model: Dense causal LM, loaded with ``attn_implementation="photon"``.
        texts: Sequences and what is predicted of them.
        window: Tokens that a restricted layer looks back on; num_sinks: first tokens that stay visible to it.
        layers: Layers that can be restricted; the others never are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: list[ProbeText],
        window: int,
        num_sinks: int,
        layers: Collection[int],
    ) -> None:
        self.model, self.texts, self.window, self.num_sinks = model, texts, window, num_sinks
        self.layers, self.heads = layers, model.config.num_key_value_heads
        self.dense, self.restricted = self.losses(layers=()), self.losses()

    @torch.no_grad()
    def losses(self, kept: Cells | None = None, layers: Collection[int] | None = None) -> dict[str, float]:
        """Mean cross-entropy in nats, by text, with the `kept` cells of restricted layers left whole.

        Args:
            layers: Restrict these alone.
        """
        layers, gates = self.layers if layers is None else layers, {}
        for layer, heads in (kept or {}).items():
            gates[layer] = torch.zeros(self.heads, device=self.model.device)
            gates[layer][heads] = 1
        found = {}
        for text in self.texts:
            total = 0.0
            for tokens, targets in zip(text.tokens.split(1), text.targets.split(1), strict=True):
                tokens, targets = tokens.to(self.model.device), targets.to(self.model.device)
                attention = DenseAttention(tokens)
                segments = attention.restricted(self.model.config, self.window, self.num_sinks, layers, gates)
                total += summed_loss(self.model, tokens, targets, segments)
            found[text.name] = total / int(text.targets[:, 1:].sum())
        return found

    def recovered(self, kept: Cells) -> dict[str, float]:
        """By text, the share of the window's cost that the `kept` cells win back: 1 is the dense model."""
        found = self.losses(kept)
        return {
            name: (self.restricted[name] - loss) / (self.restricted[name] - self.dense[name])
            for name, loss in found.items()
        }

    def leave_one_out(self, on_cell: Callable[[], None]) -> CellProbe:
        """The ranking by what restricting each cell alone costs, which takes a pass per cell, in the form of a probe.

        Its gradients are differences over the whole gate, from closed to open, with all other gates open.

        Args:
            on_cell: Called after every cell.
        """
        gradients = {text.name: [] for text in self.texts}
        for layer in range(self.model.config.num_hidden_layers):
            for differences in gradients.values():
                differences.append([0.0] * self.heads)
            for head in range(self.heads) if layer in self.layers else ():
                others = {layer: [each for each in range(self.heads) if each != head]}
                for name, loss in self.losses(others, layers=(layer,)).items():
                    gradients[name][layer][head] = self.dense[name] - loss
                on_cell()
        losses = {
            name: ProbedLoss(self.dense[name], self.restricted[name], 0.0, found) for name, found in gradients.items()
        }
        return CellProbe(self.window, self.num_sinks, losses)


def best_layers(probe: CellProbe, count: int) -> Cells:
    """All cells of the `count` layers whose cells have the highest scores together."""
    scores = probe.scores
    ranked = sorted(range(len(scores)), key=lambda layer: -sum(scores[layer]))
    return {layer: list(range(len(scores[layer]))) for layer in sorted(ranked[:count])}


def plot_cells(probe: CellProbe, output: Path) -> None:
    """Draw the scores, and the share that each loss has in them, as heat maps of layers and heads.

    Args:
        output: PNG to write; it appears when it is complete.
    """
    panels = {"all losses": probe.scores}
    for name, loss in probe.counted.items():
        panels[name] = [[-gradient / loss.cost for gradient in heads] for heads in loss.gradients]
    figure = new_figure(2 + 1.6 * len(panels), 8)
    for axes, (name, shares) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        # Few cells have shares beyond the darkest, and they stand out as they are.
        image = axes.imshow(shares, cmap="RdBu_r", vmin=-0.2, vmax=0.2, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("key-value head")
        axes.set_xticks(range(len(shares[0])))
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="share of the window's cost won back, to first order", extend="both")
    save_figure(figure, output)
