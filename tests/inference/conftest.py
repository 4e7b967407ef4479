"""Where Triton runs in these tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def triton_device() -> str:
    """A GPU if there is one; otherwise the CPU, where tests/conftest.py has chosen Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
