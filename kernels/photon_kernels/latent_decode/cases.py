"""The cases of the decode attention over latents that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from photon_kernels._compile_case import CompileCase
from photon_kernels.latent_decode.softmax import SOFTMAX_BLOCK, latent_softmax_kernel
from photon_kernels.latent_decode.triton import choose_latent_config, latent_mix_kernel, latent_weights_kernel


class _Shape(NamedTuple):
    """A case to compile: what distinguishes the kernels that users of a model run."""

    dtype: str
    element_size: int
    num_queries: int
    chunk_size: int
    kv_heads: int
    head_dim: int
    per_block: int
    joint: bool = True
    bits: int = 16


COMPILED_SHAPES = [
    _Shape("bf16", 2, 16, 2, 2, 64, per_block=128, bits=4),  # two cells of Llama-3.2-1B, the default
    _Shape("bf16", 2, 64, 4, 3, 128, per_block=64, bits=4),  # several of Llama-3.1-8B
    _Shape("bf16", 2, 4, 1, 1, 128, per_block=256, bits=4, joint=False),  # plain tokens
    _Shape("bf16", 2, 16, 2, 2, 128, per_block=128, bits=8),
    _Shape("fp32", 4, 16, 2, 2, 64, per_block=128, bits=4),
    _Shape("bf16", 2, 128, 4, 8, 64, per_block=64),  # Llama-3.2-1B
    _Shape("bf16", 2, 128, 4, 8, 128, per_block=64),  # Llama-3.1-8B
    _Shape("bf16", 2, 128, 4, 8, 64, per_block=64, joint=False),
    _Shape("bf16", 2, 64, 4, 2, 128, per_block=0, joint=False),
    _Shape("fp32", 4, 128, 4, 8, 64, per_block=64),
]


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles."""
    for shape in COMPILED_SHAPES:
        pieces = 2 if shape.bits == 4 else 1
        config = choose_latent_config(shape.num_queries, shape.head_dim // pieces, shape.element_size, shape.bits)
        layout = f"block={shape.per_block}" if shape.per_block else "contiguous"
        name = f"{shape.dtype} rows={shape.num_queries} Hkv={shape.kv_heads} D={shape.head_dim} {layout}"
        name += ("" if shape.joint else " apart") + ("" if shape.bits == 16 else f" {shape.bits} bits")
        stored = shape.dtype if shape.bits == 16 else "u8"
        types = {
            **dict.fromkeys(("folded", "weights"), f"*{shape.dtype}"),
            **dict.fromkeys(("keys", "values"), f"*{stored}"),
            **dict.fromkeys(("key_scales", "value_scales"), "*bf16" if shape.bits < 16 else f"*{stored}"),
            **dict.fromkeys(("bias", "peaks", "totals", "factors", "mixed"), "*fp32"),
            **dict.fromkeys(("visible", "rows", "block_table"), "*i64"),
            "scale_log2": "fp32",
            **dict.fromkeys(
                ("num_queries", "capacity", "num_tiles", "num_splits", "first_token", "pitch_table"), "i32"
            ),
            **{
                f"stride_{stride}": "i32"
                for stride in ("fb", "fr", "kb", "kh", "kn", "vb", "vh", "vn", "sb", "sh", "sn")
            },
        }
        constants = {
            "HAS_ROWS": True,
            "PER_BLOCK": shape.per_block,
            "JOINT": shape.joint,
            "BITS": shape.bits,
            "PIECES": pieces,
            "KV_HEADS": shape.kv_heads,
            "HEAD_DIM": shape.head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
        }
        yield CompileCase(
            name=f"latent_softmax {name}",
            kernel=latent_softmax_kernel,
            types={**dict.fromkeys(("peaks", "totals", "mass", "lse"), "*fp32"), "num_tiles": "i32"},
            constants={"CHUNK_SIZE": shape.chunk_size, "BLOCK": SOFTMAX_BLOCK},
            num_warps=4,
            num_stages=1,
        )
        kernels = {"latent_weights": latent_weights_kernel, "latent_mix": latent_mix_kernel}
        for title, kernel in kernels.items():
            extra = {"CHUNK_SIZE": shape.chunk_size} if title == "latent_weights" else {}
            yield CompileCase(
                name=f"{title} {name}",
                kernel=kernel,
                types={key: kind for key, kind in types.items() if key in kernel.arg_names},
                constants={**constants, **extra},
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
