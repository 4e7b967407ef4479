"""What `tools/bench_inference.py` measures, by profile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A decoding: `context` tokens in, `batch` rows (None: each system's best), turns of `steps` tokens."""

    mode: str
    context: int
    batch: int | None
    steps: int
    turns: int = 3


@dataclass(frozen=True)
class Prefill:
    """Prompts of `contexts` tokens in `layers` layers of a shape (None: all that it has), `turns` times each."""

    shape: str
    contexts: tuple[int, ...]
    turns: int = 2
    layers: int | None = None


# The lengths of the issue on a GPU; shorter ones of the same kinds on a CPU.
CASES = {
    "smoke": [
        Case("long", 70, None, 1, 1),
        Case("multi-query", 70, 3, 2, 1),
        Case("decode-heavy", 33, 1, 1, 1),
    ],
    "cpu": [
        Case("decode-heavy", 128, 8, 8),
        Case("prefill-heavy", 1024, 8, 4),
        Case("multi-query", 2048, 9, 4),
        Case("long", 2048, 1, 16),
        Case("long", 2048, 8, 4),
        Case("long", 4096, 8, 4),
        Case("long", 8192, 8, 4),
    ],
    # What says most comes first: a machine's time may end anywhere.
    "gpu": [
        Case("long", 4096, 32, 32),
        Case("long", 4096, None, 8),
        Case("long", 4096, 1, 32),
        Case("long", 32_768, 8, 32),
        Case("long", 32_768, None, 8),
        Case("long", 32_768, 1, 32),
        Case("multi-query", 4096, 64, 16),
        Case("decode-heavy", 128, 32, 16),
        Case("prefill-heavy", 2048, 32, 16),
        Case("long", 131_072, 1, 32),
        Case("long", 131_072, None, 8),
    ],
}
# On a GPU the time to the first token of the cases above says it.
PREFILLS = {"smoke": Prefill("demo", (70,), 1, 2), "cpu": Prefill("smollm2", (4096, 16_384))}
NEW_TOKENS = {"prefill-heavy": 128, "decode-heavy": 2048}  # of an answer, for end-to-end figures; else 256
