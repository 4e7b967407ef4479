"""What a quantised format has to tell: which stored tensors make one weight, and what the weight then is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.errors import PhotonError


class Format(Protocol):
    """One way of storing quantised weights.

    A checkpoint holds plain weights beside quantised ones (norms, embeddings, layers that were left out): what is
    stored decides, weight by weight, not the list of exceptions in ``config.json``.

    Attributes:
        title: What it is called in the plan.
        ignored: Endings of stored tensors that weights do not depend on, such as factors of activations.
    """

    title: str
    ignored: tuple[str, ...]

    def parts(self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
        """The stored tensors that make one weight, checked as far as headers allow.

        Args:
            name: The weight, such as ``model.layers.0.mlp.up_proj.weight``.
            shape: Its shape by ``config.json``.
            stored: Every stored tensor.

        Returns:
            Role -> name of a stored tensor; None if this weight is not stored in the format.

        Raises:
            PhotonError: naming the file and the tensor, if a part is missing, or of another shape or type.
        """

    def dequantise(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """The weight in float32, of `shape`.

        Args:
            parts: Role -> tensor, by `parts`; they may be overwritten.
            shape: As in `parts`.

        Raises:
            PhotonError: if what is stored contradicts itself; the message goes on after the weight's name.
        """


def need_part(part: str, of: str, file: Path | None, stored: Mapping[str, TensorInfo]) -> TensorInfo:
    """The stored tensor `part` of weight `of`.

    Raises:
        PhotonError: naming `file`, if it is not stored.
    """
    if part not in stored:
        raise PhotonError(f"{file}: tensor {of} is quantised, but {part} is missing: download the checkpoint again")
    return stored[part]


def check_shape(part: str, info: TensorInfo, *shapes: tuple[int, ...]) -> None:
    """Check a stored tensor's shape against those that it may have.

    Raises:
        PhotonError: naming the file and the shapes.
    """
    if info.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise PhotonError(
            f"{info.file}: tensor {part} has shape {list(info.shape)}, its weight calls for {wanted}: config.json and "
            "the weights do not belong together; download both again"
        )


def check_dtype(part: str, info: TensorInfo, *dtypes: torch.dtype) -> None:
    """Check a stored tensor's type against those that it may have.

    Raises:
        PhotonError: naming the file and the types.
    """
    if info.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(info.dtype).removeprefix("torch.") if info.dtype else "a type that is not known"
        raise PhotonError(
            f"{info.file}: tensor {part} is stored in {found}, which is none of {wanted}: use the unquantised weights"
        )
