"""Exports on vLLM itself; `make test-vllm` makes the environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.exit("tests/vllm needs vLLM: run `make test-vllm`", returncode=2)

# Chosen by `tests/conftest.py` for our kernels; vLLM has kernels of its own.
os.environ.pop("TRITON_INTERPRET", None)
# A cache of one GiB, threads that the system may move, and the scheduler in the test's own process.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)

from vllm import LLM  # noqa: E402


@pytest.fixture
def serve() -> Iterator[Callable[..., LLM]]:
    """Makes a vLLM of an export's directory; what is made is shut down."""
    made: list[LLM] = []

    def make(directory: Path, **settings: Any) -> LLM:
        fixed = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512, "enforce_eager": True}
        made.append(LLM(str(directory), **{**fixed, "disable_log_stats": False, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
