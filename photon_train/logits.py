"""What a causal LM's head reads, and what its family does to logits, for losses that take them piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Inside, `logits` of `model`, a causal LM of transformers, are the states that its head would have read.

    A factor that a family puts on its logits is on them; a bound of logits (`logit_bound`) is not: it goes on what the
    head makes of them.
    """
    head, bound = model.get_output_embeddings(), logit_bound(model.config)
    if bound is not None:
        model.config.final_logit_softcapping = None
    # Set on the instance and not replaced by another module: hooks (ZeRO-3) and names stay as they are.
    head.forward = lambda states, *_, **__: states
    try:
        yield
    finally:
        del head.forward
        if bound is not None:
            model.config.final_logit_softcapping = bound


def logit_bound(config: Any) -> float | None:
    """The bound c of a family's logits, which become ``c * tanh(logit / c)`` (Gemma's final_logit_softcapping)."""
    return getattr(config, "final_logit_softcapping", None)
