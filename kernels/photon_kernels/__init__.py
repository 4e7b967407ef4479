"""Inference kernels of PHOTON models: one folder per operation, each with a torch and a Triton backend.

Importing this package needs torch alone. Triton is imported by the first call with ``backend="triton"``.
"""

from __future__ import annotations

from photon_kernels.cache_append import Append, cache_append
from photon_kernels.chunker import gather_chunk_project
from photon_kernels.latent_decode import LatentMix, latent_decode, latent_decode_bytes
from photon_kernels.latent_outputs import latent_outputs
from photon_kernels.latent_queries import latent_queries
from photon_kernels.paged_decode import paged_decode_attention
from photon_kernels.unit_pack import unit_pack
from photon_kernels.window_decode import window_decode_attention

__all__ = [
    "Append",
    "LatentMix",
    "cache_append",
    "gather_chunk_project",
    "latent_decode",
    "latent_decode_bytes",
    "latent_outputs",
    "latent_queries",
    "paged_decode_attention",
    "unit_pack",
    "window_decode_attention",
]
