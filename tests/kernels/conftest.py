"""Where the kernels run in these tests: on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# The interpreter must be chosen before triton is imported, because its library functions are decorated then.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """The device of the inputs for both backends."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton import JITFunction
        from triton.language import sum as library_function

        if isinstance(library_function, JITFunction):
            pytest.fail("triton was imported before TRITON_INTERPRET=1 was set")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("triton was imported without TRITON_INTERPRET=1, and there is no GPU to run the kernels on")
    return torch.device("cuda")
