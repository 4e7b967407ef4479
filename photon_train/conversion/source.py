"""A dense checkpoint, opened lazily: a directory or hub id in Hugging Face's format (safetensors), or a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from photon_train.checkpoints import refuse_adapter
from photon_train.conversion.cache import cache_path, write_once
from photon_train.conversion.dequantise.checkpoint import (
    Quantised,
    QuantisedCheckpoint,
    foretell,
    read_note,
    sort_tensors,
)
from photon_train.conversion.dequantise.interface import Format
from photon_train.conversion.dequantise.methods import METHODS, format_of, method_of
from photon_train.conversion.families import FAMILIES, check_config, check_rope_type, dense_tensors, family_of
from photon_train.conversion.gguf import cached_checkpoint, find_gguf
from photon_train.conversion.layout import INDEX, SINGLE, TEMPLATES, TOKENIZER_FILES
from photon_train.conversion.safetensors_io import TensorInfo, is_finite, join_pieces, read_header, read_pieces
from photon_train.errors import PhotonError
from photon_train.manifest import FILE_NAME, hash_file, verify_manifest

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISATION = "quantization_config"
# Everything in folders of the hub (original/, onnx/, ...: other copies of the weights) but the templates.
_FOLDERS = ("[!a]*/*", "a[!d]*/*")
_CONVERT_PICKLE = (
    "pickle files are never read: load the model with transformers on a machine you trust and save it again "
    "with `model.save_pretrained(directory)`"
)


class DenseCheckpoint:
    """A dense model on disk; made by `open`.

    Attributes:
        directory: Where its files lie.
        config: Its configuration (a class of transformers; no remote code).
        tensors: Name -> `TensorInfo` of every stored tensor.
        quantised: What it was dequantised from, if it was.
    """

    def __init__(
        self,
        directory: Path,
        config: PretrainedConfig,
        tensors: dict[str, TensorInfo],
        quantised: Quantised | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.quantised = quantised

    @classmethod
    def open(
        cls, model: str, revision: str | None = None, token: str | None = None, weights: bool = True
    ) -> DenseCheckpoint:
        """Open a checkpoint and check it as far as headers allow: no tensor is read.

        Quantised weights and GGUF files are dequantised into the cache first, and what lies there is opened.

        Args:
            model: A directory, a hub id, or a GGUF file (or the directory of one).
            revision: Branch, tag or commit (hub id only).
            token: Access token of the hub; None uses the stored login.
            weights: Whether weights are needed. Without them, of a hub model only the small files are
                downloaded, a directory may hold none, and `tensors` then has what the configuration implies.

        Raises:
            PhotonError: naming the file and the fix, if the model cannot be found, is not a safetensors
                checkpoint of a supported family, has missing, truncated, corrupt or contradictory files, or holds
                an adapter.
        """
        directory, local = _resolve(model, revision, token, weights)
        refuse_adapter(directory)
        config, form = _read_config(directory)
        expected = dense_tensors(config)
        if not weights and not (local and _has_weights(directory)):
            tensors = _as_if_stored(config, expected)
            return cls(directory, config, tensors, form and foretell(str(directory), form, expected, config.dtype))
        stored = _read_headers(directory)
        if form is None:
            _check_tensors(directory, stored, expected)
            return cls(directory, config, stored, read_note(directory))
        quantised = sort_tensors(directory, form, expected, stored)
        _check_tensors(directory, stored, quantised.plain)
        if not weights:
            tensors = _as_if_stored(config, quantised.weights)
            return cls(directory, config, tensors, quantised.describe(config.dtype))
        return cls.open(str(_dequantised(cls(directory, config, stored), quantised)))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights (the embedding's stands for all)."""
        return self.tensors["model.embed_tokens.weight"].dtype

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values() if info.file})

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield one tensor's elements, flat, a few megabytes at a time.

        Raises:
            PhotonError: if a weight is not finite; the message names the tensor and its file.
        """
        info = self.tensors[name]
        for piece in read_pieces(info):
            if not is_finite(piece):
                raise PhotonError(f"{info.file}: tensor {name} holds NaN or infinite weights; use a sound checkpoint")
            yield piece

    def load(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            PhotonError: if a weight is not finite.
        """
        return join_pieces(self.tensors[name], self.pieces(name))

    def check_tokenizer(self) -> None:
        """Check that every token id of the tokenizer beside the weights has an embedding.

        Raises:
            PhotonError: if the tokenizer's ids exceed the vocabulary.
        """
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            return
        content = _read_json(path)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        # Unigram models list [token, score] pairs; the others map tokens to ids.
        highest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1)
        highest = max([highest, *(entry["id"] for entry in content.get("added_tokens") or ())])
        if highest >= self.config.vocab_size:
            raise PhotonError(
                f"{path} has token ids up to {highest}, but config.json has vocab_size={self.config.vocab_size}: "
                "use the tokenizer that belongs to the weights, or resize the embedding first"
            )

    def check_hashes(self) -> None:
        """Check the weight files against the hashes that are known.

        Known are those of a ``manifest.json`` beside the weights, and those of files in the hub's cache,
        where a file lies under its sha256.

        Raises:
            PhotonError: if a file's content differs.
        """
        if (self.directory / FILE_NAME).is_file() and "files" in _read_json(self.directory / FILE_NAME):
            verify_manifest(self.directory)
            return
        for file in self.files:
            known = file.resolve().name
            if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", known) and hash_file(file) != known:
                raise PhotonError(f"{file} has a wrong sha256 (known: {known}): delete it and download it again")


def loadable(model: str) -> str | Path:
    """What transformers loads for a model's name: the dequantised copy, where the name is that of a GGUF file or of a
    directory with weights that are dequantised here; else the name.

    Raises:
        PhotonError: as `DenseCheckpoint.open`.
    """
    path = Path(model)
    gguf = find_gguf(path)
    if gguf is not None:
        return cached_checkpoint(gguf)
    if (path / "config.json").is_file():
        content = _read_json(path / "config.json")
        if content.get("model_type") in FAMILIES and method_of(content.get(_QUANTISATION)) in METHODS:
            return DenseCheckpoint.open(model).directory
    return model


def _resolve(model: str, revision: str | None, token: str | None, weights: bool) -> tuple[Path, bool]:
    """The directory of `model`, and whether it is the user's own."""
    path = Path(model).expanduser()
    gguf = find_gguf(path)
    if gguf is not None:
        return cached_checkpoint(gguf, weights), True
    if path.is_dir():
        return path, True
    if path.is_file():
        raise PhotonError(f"model={model} is a file, and no GGUF: give the directory that holds it and config.json")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise PhotonError(f"model={model}: there is no such directory")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    patterns = ["*.json", *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja"]
    if weights:
        patterns.append("model*.safetensors")
    try:
        directory = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=list(_FOLDERS),
        )
    except GatedRepoError:
        raise PhotonError(
            f"model={model} is gated on the hub: accept its licence there, then log in or set hub.token"
        ) from None
    except Exception as error:  # many libraries below raise their own types; each means the same to the user
        at = f" at revision {revision}" if revision else ""
        raise PhotonError(
            f"model={model}{at} is neither a directory nor reachable on the hub "
            f"({type(error).__name__}): check the name, hub.revision, hub.token and the network"
        ) from error
    return Path(directory), False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise PhotonError(f"{path} is not valid JSON: download it again") from None
    if not isinstance(content, dict):
        raise PhotonError(f"{path} does not hold a JSON object: download it again")
    return content


def _read_config(directory: Path) -> tuple[PretrainedConfig, Format | None]:
    """The configuration without what it says of a quantisation, and the format that this names.

    The type of quantised weights is the one that they are dequantised to: that of the model, bfloat16 if it names none.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise PhotonError(f"{directory} has no config.json: give the directory of a Hugging Face checkpoint")
    content = _read_json(path)
    try:
        family_of(content)
        check_rope_type(content)
        form = format_of(content[_QUANTISATION]) if content.get(_QUANTISATION) else None
    except PhotonError as error:
        raise PhotonError(f"{path}: {error}") from None
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if form is not None:
            del config.quantization_config
            config.dtype = config.dtype if config.dtype in FLOATS[1:] else torch.bfloat16
        check_config(config)
    except PhotonError as error:
        raise PhotonError(f"{path}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PhotonError(f"{path} cannot be read: {reason}") from error
    return config, form


def _as_if_stored(config: PretrainedConfig, weights: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Tensors that are known by name and shape, not by place."""
    dtype = config.dtype or torch.float32
    return {name: TensorInfo(shape, dtype, None) for name, shape in weights.items()}


def _dequantised(checkpoint: DenseCheckpoint, quantised: QuantisedCheckpoint) -> Path:
    """The directory of a quantised checkpoint's weights as ordinary ones, written on first use."""
    directory, dtype = checkpoint.directory, checkpoint.config.dtype
    content = _read_json(directory / "config.json")
    for key in (_QUANTISATION, "torch_dtype"):
        content.pop(key, None)
    content["dtype"] = str(dtype).removeprefix("torch.")

    def write(output: Path) -> None:
        checkpoint.check_hashes()
        quantised.write(output, content, dtype)

    return write_once(cache_path("dequantised", directory.resolve().name, quantised.key(dtype)), write)


def _has_weights(directory: Path) -> bool:
    """Whether there is anything that is, or was meant to be, a checkpoint's weights."""
    return any(
        path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name == INDEX for path in directory.iterdir()
    )


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        if any(directory.glob("model-*.safetensors")):
            raise PhotonError(f"{directory} has shards but no {INDEX}: download it too")
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise PhotonError(f"{directory} has no {SINGLE}; {_CONVERT_PICKLE}")
        raise PhotonError(f"{directory} has neither {SINGLE} nor {INDEX}: only safetensors weights are read")
    return _read_sharded(directory)


def _read_sharded(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise PhotonError(f"{index} has no weight_map: download it again")
    shards = sorted(set(mapping.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise PhotonError(f"{index} names files outside its directory: do not use it")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise PhotonError(f"{directory / missing[0]} is missing ({len(missing)} of {len(shards)} shards): download it")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(directory / shard).items():
            if name in tensors:
                raise PhotonError(f"tensor {name} is stored twice: in {tensors[name].file} and in {info.file}")
            tensors[name] = info
    for name, shard in mapping.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise PhotonError(f"{index} says that {directory / shard} holds tensor {name}, but it does not")
    return tensors


def _check_tensors(directory: Path, tensors: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PhotonError(f"{directory} lacks tensor {missing[0]}{more}, which its config.json calls for")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise PhotonError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json calls for {list(shape)}"
            )
        if info.dtype not in FLOATS:
            raise PhotonError(
                f"{info.file}: tensor {name} is not stored as float16, bfloat16, float32 or float64 (a quantised "
                "checkpoint?); use the unquantised weights"
            )
