"""Cross-entropy of a causal LM by position, on texts longer than its logits can be held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from photon_train.data.corpora import Document
from photon_train.errors import PhotonError

# Positions at which buckets begin and end; the last is for whatever is longer.
EDGES = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768)
# Elements of the logits that are held: 128 MiB in float32.
_LOGITS = 2**25
_LONGEST_SEGMENT = 2048
MakeCache = Callable[[], Any]


def long_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> torch.Tensor:
    """Pieces of long documents, the first of every document before the second of any.

    Args:
        documents: Held-out texts; those shorter than `length` give none.
        tokenizer: If it begins texts with a special token, every piece begins with it.
        length: Tokens of a piece.
        count: Pieces to take at most.

    Returns:
        ``[count or fewer, length]``, int64.

    Raises:
        PhotonError: if no document is long enough.
    """
    start = special_start(tokenizer)
    step = length - len(start)
    encoded: list[list[int]] = []
    for document in documents:
        # Pieces are taken in turns: a document never gives more than `count`, and never is more of it encoded.
        text = document.text[: 16 * step * count]
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(tokens) >= step:
            encoded.append(tokens)
    pieces = [
        start + tokens[index * step : (index + 1) * step]
        for index in range(count)
        for tokens in encoded
        if len(tokens) >= (index + 1) * step
    ][:count]
    if not pieces:
        raise PhotonError(
            f"none of {len(documents)} documents has {length:,} tokens: give longer ones (--data), or take shorter "
            "lengths (--lengths)"
        )
    return torch.tensor(pieces)


def special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that `tokenizer` begins every text with, or none."""
    tokens = tokenizer("a").input_ids
    return tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []


def segment_length(model: PreTrainedModel) -> int:
    """Tokens of one row that are read at once, so that their logits stay small."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(64, min(_LONGEST_SEGMENT, _LOGITS // vocabulary // 64 * 64))


@torch.no_grad()
def position_losses(
    model: PreTrainedModel,
    row: torch.Tensor,
    make_cache: MakeCache | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Cross-entropy of every token of a text but the first.

    The text is read in segments with the model's cache: logits of one segment are held, and what is measured is the
    path that generation takes.

    Args:
        model: On its device, in evaluation mode.
        row: ``[T]``, token ids.
        make_cache: Makes the cache to read with; None: the model's own.
        on_tokens: Is told the tokens read, segment by segment.

    Returns:
        ``[T - 1]`` in nats, float32, on the CPU: element i is the loss of token i + 1.
    """
    device = model.get_input_embeddings().weight.device
    cache = None if make_cache is None else make_cache()
    losses = []
    for start in range(0, len(row) - 1, step := segment_length(model)):
        tokens = row[start : start + step]
        out = model(input_ids=tokens[None].to(device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        targets = row[start + 1 : start + 1 + len(tokens)].to(device)
        losses.append(F.cross_entropy(out.logits[0, : len(targets)].float(), targets, reduction="none").cpu())
        if on_tokens is not None:
            on_tokens(len(tokens))
    return torch.cat(losses)


def bucket_means(losses: torch.Tensor, beyond: int) -> dict[str, Any]:
    """Means of `position_losses` over texts of one length.

    Args:
        losses: ``[N, T - 1]``.
        beyond: Tokens of a text that do not count as beyond the window.

    Returns:
        ``ce`` (all positions), ``ce_beyond_window`` (tokens after the first `beyond`; None if there are none), and
        ``ce_by_position``: bucket such as ``256-1024`` -> mean, for the buckets that the texts reach.
    """
    position = torch.arange(1, losses.shape[1] + 1)
    by_position = {}
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        inside = (position >= low) & (position < (high or len(position) + 1))
        if inside.any():
            by_position[f"{low}-{high}" if high else f"{low}-"] = losses[:, inside].mean().item()
    outside = position >= beyond
    return {
        "ce": losses.mean().item(),
        "ce_beyond_window": losses[:, outside].mean().item() if outside.any() else None,
        "ce_by_position": by_position,
    }
