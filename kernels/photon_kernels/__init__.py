"""Inference kernels of PHOTON models: one folder per operation, each with a torch and a Triton backend.

Importing this package needs torch alone. Triton is imported by the first call with ``backend="triton"``.
"""

from __future__ import annotations

from photon_kernels.chunker import gather_chunk_project
from photon_kernels.merge import merge_attention
from photon_kernels.summary_decode import summary_decode_attention
from photon_kernels.window_decode import window_decode_attention

__all__ = ["gather_chunk_project", "merge_attention", "summary_decode_attention", "window_decode_attention"]
