"""Which cells of a dense model need their far attention: a zero-shot probe by one gradient (DESIGN 5).

A cell is a key-value head of a layer. Its output is taken as ``a * far + (1 - a) * window``; one backward pass at
a = 0.5 in all cells gives the derivative of the loss by every a. At a = 1, the dense model itself, the derivative tells
little: there the cells of a circuit stand in for each other, and none is missed at first order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from photon_train.accounting.memory import LOGIT_CHUNK
from photon_train.accounting.shape import Shape
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.errors import PhotonError
from photon_train.logits import headless, logit_bound
from photon_train.models.attention_photon import Segment
from photon_train.models.softmax_photon import capped

MIDDLE = 0.5
# What a pass with gradients takes, in forward passes (measured): forward, each checkpointed layer again, and backward
# to the activations, all with both kinds of attention.
_GRADIENT_COST = 6
_SHOWN = 16  # cells in the table
# A loss counts if the window costs more than so many standard errors of that cost.
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class ProbeText:
    """Sequences that one of the probe's losses is taken on.

    Attributes:
        name: Such as `text` or `needles`.
        tokens: Token ids ``[N, T]``.
        targets: Which tokens are predicted, ``[N, T]``, boolean; the first of a sequence never is.
    """

    name: str
    tokens: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class ProbedLoss:
    """What the probe found on one kind of text; losses in nats per predicted token.

    Attributes:
        dense: Of the dense model.
        restricted: With every probed layer restricted to the window.
        error: Standard error of the difference of both, over the sequences; 0 for a single one.
        gradients: Derivative by each cell's gate, ``[layers][heads]``; negative where far attention helps, 0 in layers
            that were left alone.
    """

    dense: float
    restricted: float
    error: float
    gradients: list[list[float]]

    @property
    def cost(self) -> float:
        """What the window costs."""
        return self.restricted - self.dense

    @property
    def counts(self) -> bool:
        """Whether the window costs anything beyond the noise of so few sequences."""
        return self.cost > 0 and self.cost > _STANDARD_ERRORS * self.error


@dataclass(frozen=True)
class CellProbe:
    """The probe of a dense model.

    Attributes:
        window: Tokens that a restricted layer looks back on.
        num_sinks: First tokens that stay visible to it.
        losses: By the name of their text.
    """

    window: int
    num_sinks: int
    losses: dict[str, ProbedLoss]

    @property
    def counted(self) -> dict[str, ProbedLoss]:
        """The losses on which the window costs anything; only they have a say."""
        return {name: loss for name, loss in self.losses.items() if loss.counts}

    @property
    def scores(self) -> list[list[float]]:
        """By layer and head, the share of the window's cost that the cell wins back, to first order.

        ``[layers][heads]``; the mean over the losses that count, each divided by what the window costs on it; 0 where
        none does.
        """
        shares = [-torch.tensor(loss.gradients, dtype=torch.double) / loss.cost for loss in self.counted.values()]
        if not shares:
            return [[0.0] * len(heads) for heads in next(iter(self.losses.values())).gradients]
        return torch.stack(shares).mean(dim=0).tolist()

    def best_cells(self, count: int, among: Collection[int] | None = None) -> dict[int, list[int]]:
        """The `count` cells of the highest scores.

        Args:
            among: Layers that can have cells; None: all.

        Returns:
            Key-value heads by layer, both in order.

        Raises:
            PhotonError: if the window costs nothing on any of the losses, which leaves nothing to rank by.
        """
        if not self.counted:
            raise PhotonError(
                f"the probe finds nothing that a window of {self.window} tokens costs this model on {self._names()}: "
                "lower photon.window, give longer text (train.seq_len), or name photon.memory_cells"
            )
        found: dict[int, list[int]] = {}
        for layer, head in sorted(self._ranked(among)[:count]):
            found.setdefault(layer, []).append(head)
        return found

    def table(self) -> Table:
        """The best cells for a screen, and what each loss says of them."""
        ends = "; ".join(
            f"{name} {loss.dense:.3f} -> {loss.restricted:.3f}{'' if loss.counts else ' (costs nothing: left out)'}"
            for name, loss in self.losses.items()
        )
        table = Table(
            title=f"Far attention by cells. Loss of the dense model -> with a window of {self.window}: {ends}"
        )
        for column in ("Layer", "Head", "wins back", *self.counted):
            table.add_column(column, justify="right")
        for layer, head in self._ranked(None)[:_SHOWN] if self.counted else ():
            shares = [-loss.gradients[layer][head] / loss.cost for loss in self.counted.values()]
            columns = [f"{share:.1%}" for share in (self.scores[layer][head], *shares)]
            table.add_row(str(layer), str(head), *columns)
        return table

    def to_json(self) -> str:
        """The probe as JSON, with the scores for whoever reads it."""
        return json.dumps({**asdict(self), "scores": self.scores}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CellProbe:
        """Read what `to_json` wrote.

        Raises:
            PhotonError: if the text is not a probe.
        """
        try:
            content = json.loads(text)
            losses = {name: ProbedLoss(**loss) for name, loss in content["losses"].items()}
            return cls(content["window"], content["num_sinks"], losses)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PhotonError(f"this is not a probe of cells ({error}): probe the dense model again") from error

    def _ranked(self, among: Collection[int] | None) -> list[tuple[int, int]]:
        scores = self.scores
        cells = [(layer, head) for layer, heads in enumerate(scores) for head in range(len(heads))]
        allowed = [cell for cell in cells if among is None or cell[0] in among]
        return sorted(allowed, key=lambda cell: -scores[cell[0]][cell[1]])

    def _names(self) -> str:
        return ", ".join(self.losses)


def probe_cells(
    model: PreTrainedModel,
    texts: Sequence[ProbeText],
    window: int,
    num_sinks: int = 4,
    layers: Collection[int] | None = None,
    gate: float = MIDDLE,
    on_pass: Callable[[float, float], None] | None = None,
) -> CellProbe:
    """Probe every cell of a dense model, without training.

    A sequence goes through the model by itself, three times: as the dense model, restricted, and with half-open gates
    and a backward pass, whose layers are computed again instead of kept where the model supports that.

    Args:
        model: Dense causal LM, loaded with ``attn_implementation="photon"``. It runs in its own type, the gates in fp32
            or better; it is left as it was.
        texts: What the losses are taken on.
        window: Tokens that a restricted layer looks back on.
        num_sinks: First tokens that stay visible.
        layers: The layers to probe, those that can have memory; the others stay as they are. None: all.
        gate: Where the derivative is taken.
        on_pass: Called after every pass with the work done and all of it, in tokens through a forward pass.

    Raises:
        PhotonError: if there is no text, nothing of it is predicted, or its sequences are not longer than the window.
    """
    _check(texts, window)
    shape = Shape.of(model.config)
    layers = range(shape.layers) if layers is None else sorted(layers)
    dtype = torch.promote_types(model.dtype, torch.float32)
    total = sum(text.tokens.numel() for text in texts) * (2 + _GRADIENT_COST)
    done, losses = 0, {}

    def passed(tokens: torch.Tensor, cost: int) -> None:
        nonlocal done
        done += tokens.numel() * cost
        if on_pass is not None:
            on_pass(done, total)

    with _frozen(model):
        for text in texts:
            gates = {
                layer: torch.full((shape.kv_heads,), gate, dtype=dtype, device=model.device, requires_grad=True)
                for layer in layers
            }
            sums = []
            for tokens, targets in zip(text.tokens.split(1), text.targets.split(1), strict=True):
                tokens, targets = tokens.to(model.device), targets.to(model.device)
                attention = DenseAttention(tokens)
                with torch.no_grad():
                    dense = summed_loss(model, tokens, targets, attention.dense(model.config))
                    passed(tokens, 1)
                    near = attention.restricted(model.config, window, num_sinks, layers)
                    restricted = summed_loss(model, tokens, targets, near)
                    passed(tokens, 1)
                half_open = attention.restricted(model.config, window, num_sinks, layers, gates)
                summed_loss(model, tokens, targets, half_open)
                passed(tokens, _GRADIENT_COST)
                sums.append((dense, restricted, int(targets[:, 1:].sum())))
            losses[text.name] = _probed(sums, gates, shape)
    return CellProbe(window, num_sinks, losses)


def summed_loss(model: PreTrainedModel, tokens: torch.Tensor, targets: torch.Tensor, segments: list[Segment]) -> float:
    """Cross-entropy in nats, summed over the tokens ``[B, T]`` that `targets` marks.

    Where gradients are enabled, the backward pass is done too: those of the gates in `segments` are added up there.
    """
    head = model.get_output_embeddings()
    rows = max(1, LOGIT_CHUNK // model.config.vocab_size)  # the logits of whole sequences are never held
    with headless(model):
        states = model(input_ids=tokens, use_cache=False, photon_segments=segments).logits
    chosen, total = targets[:, 1:], 0.0
    states, wanted = states[:, :-1][chosen], tokens[:, 1:][chosen]
    read = states.detach().requires_grad_(states.requires_grad)
    for begin in range(0, len(wanted), rows):
        logits = capped(head(read[begin : begin + rows]), logit_bound(model.config))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, wanted[begin : begin + rows], reduction="sum")
        if states.requires_grad:
            loss.backward()
        total += loss.item()
    if states.requires_grad:
        states.backward(read.grad)
    return total


def _check(texts: Sequence[ProbeText], window: int) -> None:
    if not texts:
        raise PhotonError("the probe needs text: give at least one kind of it")
    for text in texts:
        if text.tokens.shape[0] == 0 or text.tokens.shape[1] <= window + 1:
            raise PhotonError(
                f"the probe needs sequences of more than {window + 1} tokens, and those of {text.name} are "
                f"{text.tokens.shape[0]} of {text.tokens.shape[1]}: raise train.seq_len, or lower photon.window"
            )
        if not text.targets[:, 1:].any():
            raise PhotonError(f"the probe predicts no token of {text.name}: give it longer sequences (train.seq_len)")


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, its weights without gradients and its layers checkpointed; then as it was."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    was_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.eval().requires_grad_(False)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            # Layers are checkpointed in training mode alone; what they hold (dropout) stays in evaluation mode.
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    try:
        yield
    finally:
        if model.supports_gradient_checkpointing and not was_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for parameter in learned:
            parameter.requires_grad_(True)


def _probed(sums: list[tuple[float, float, int]], gates: dict[int, torch.Tensor], shape: Shape) -> ProbedLoss:
    """From the summed losses of the sequences, with their predicted tokens, and the gates' summed gradients."""
    dense, restricted, count = (math.fsum(column) for column in zip(*sums, strict=True))
    gradients = [
        (gates[layer].grad / count).tolist() if layer in gates else [0.0] * shape.kv_heads
        for layer in range(shape.layers)
    ]
    cost, number = (restricted - dense) / count, len(sums)
    # Of a ratio of sums: sequences may predict different numbers of tokens.
    spread = math.fsum((after - before - cost * tokens) ** 2 for before, after, tokens in sums)
    error = math.sqrt(spread * number / (number - 1)) / count if number > 1 else 0.0
    return ProbedLoss(dense / count, restricted / count, error, gradients)
