"""A GGUF file as a source: dequantised once, through transformers, into an ordinary checkpoint.

What a file cannot say, or what transformers does not read from it, is refused: a model that loads and computes
something else is worse than none.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from photon_train.checkpoints import refuse_adapter
from photon_train.conversion.cache import cache_path, write_once
from photon_train.conversion.families import check_config, family_of
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, check_can_write
from photon_train.layouts import LAYOUTS

SUFFIX = ".gguf"
# Raise it when the code makes something else of a file, so that older caches are not taken for it.
_VERSION = 1
_MAGIC = b"GGUF"
_TRANSFORMERS = "5.23"  # the oldest release that was tried
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# How a byte-level vocabulary wants its text split before merging: the names that transformers reads ...
_SPLIT_BY_TRANSFORMERS = ("default", "gpt-2", "llama-bpe", "llama3", "llama-v3", "dbrx", "tekken", "qwen2", "gpt-4o")
# ... and those whose digits stand alone, for which it would take GPT-2's.
_SPLIT_DIGITS = ("smollm",)
# Architecture and layers of models whose scale of attention scores no file says: it does not follow from the heads.
_OTHER_SCALE = (("gemma2", 46), ("gemma3", 62))


@dataclass(frozen=True)
class _Header:
    """What is read of a file before any weight.

    Attributes:
        architecture: ``general.architecture``, llama.cpp's name.
        splitting: ``tokenizer.ggml.pre``; None for SentencePiece vocabularies.
        context_length: Positions the model was trained for, if it says so.
        vocabulary: Entries of its tokenizer.
        dtype: What the weights are saved in.
        num_weights: Elements of all tensors.
    """

    architecture: str
    splitting: str | None
    context_length: int | None
    vocabulary: int
    dtype: torch.dtype
    num_weights: int


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that the directory `path` holds in place of other weights; else None.

    Raises:
        PhotonError: if a directory holds several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise PhotonError(f"{path} holds {len(found)} GGUF files: name one of them, for example {found[0]}")
    return found[0] if found else None


def cached_checkpoint(file: Path, weights: bool = True) -> Path:
    """The checkpoint directory of a GGUF file, dequantised on first use.

    The cache goes by the file's place, size and time of change. Processes that ask at the same time wait for one.

    Args:
        file: The GGUF file.
        weights: Whether they are needed; without them a directory that has none is enough.

    Raises:
        PhotonError: as `dequantise`, and if an adapter lies beside the file or the cache cannot be written.
    """
    refuse_adapter(file.parent)
    status = file.stat()
    key = f"{_VERSION} {file.resolve()} {status.st_size} {status.st_mtime_ns}"
    whole = cache_path("gguf", file.stem, key)
    wanted = whole if weights or whole.is_dir() else whole.with_name(f"{whole.name}-config")
    return write_once(wanted, lambda output: dequantise(file, output, weights))


def dequantise(file: Path, output: Path, weights: bool = True) -> None:
    """Write the model of a GGUF file as a checkpoint directory: configuration, tokenizer, chat template, safetensors.

    Weights of F32, F16 and BF16 files keep their type. Quantised ones are saved in bfloat16, in which most such models
    were published: its rounding (1/512 of a weight) is small beside a quantisation step, and costs half of float32. All
    weights are in memory once. A ``tokenizer.json`` beside the file is taken in place of the file's own vocabulary.

    Args:
        file: The GGUF file.
        output: New directory; it appears whole or not at all.
        weights: Whether to write the weights; without them only the small files are.

    Raises:
        PhotonError: if the package ``gguf`` is absent, the file is damaged or a part of several, its architecture,
            quantisation, rotation or tokenizer cannot be read, or the disk is full.
    """
    header = _read_header(file)
    size = header.num_weights * header.dtype.itemsize if weights else 0
    check_can_write(output, size, f"the dequantised {file.name}")
    config = _read_config(file, header)
    tokenizer = _read_tokenizer(file, header)
    with atomic_directory(output) as directory:
        if weights:
            _load(file, config).save_pretrained(directory)
        else:
            config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _read_header(file: Path) -> _Header:
    """Read and check what a file says of itself; the weights stay on the disk."""
    if importlib.util.find_spec("gguf") is None:
        raise PhotonError(f"{file}: GGUF files need the package gguf: pip install 'photon-train[gguf]'")
    if not hasattr(transformers, "GgufConfig"):  # older releases split text in GPT-2's way, whatever the file says
        raise PhotonError(f"{file}: GGUF files need transformers {_TRANSFORMERS} or later: pip install -U transformers")
    import gguf

    with open(file, "rb") as stream:
        if stream.read(4) != _MAGIC:
            raise PhotonError(f"{file} is not a GGUF file: download it again")
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.to")}
        values = {name: field.contents() for name, field in fields.items() if name != "tokenizer.ggml.merges"}
        tensors = list(reader.tensors)
        architecture = values["general.architecture"]
    except Exception as error:  # a damaged file fails wherever its reader stumbles
        reason = (str(error).splitlines() or [""])[0]
        if "GGMLQuantizationType" in reason:
            raise PhotonError(f"{file}: unknown quantisation ({reason}): update the package gguf") from error
        raise PhotonError(f"{file} cannot be read ({reason or type(error).__name__}): download it again") from error
    if values.get("split.count", 1) > 1:
        raise PhotonError(f"{file} is one of {values['split.count']} parts: merge them with `llama-gguf-split --merge`")
    _check_rotation(file, architecture, values, {tensor.name for tensor in tensors})
    if (architecture, values.get(f"{architecture}.block_count")) in _OTHER_SCALE:
        raise PhotonError(
            f"{file}: its query_pre_attn_scalar is lost when transformers reads GGUF: use the model's safetensors "
            "checkpoint"
        )
    stored = Counter()
    for tensor in tensors:
        if tensor.tensor_type.name not in stored:
            _check_quantisation(file, tensor, gguf.quants.dequantize)
        stored[tensor.tensor_type.name] += int(tensor.n_elements)
    if not stored:
        raise PhotonError(f"{file} holds no weights (a vocabulary only?): download the model's file")
    return _Header(
        architecture,
        values.get("tokenizer.ggml.pre") if values.get("tokenizer.ggml.model") == "gpt2" else None,
        values.get(f"{architecture}.context_length"),
        len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0,
        # Norms are in F32 in every file: what most weights are stored in decides.
        _STORED.get(stored.most_common(1)[0][0], torch.bfloat16),
        sum(stored.values()),
    )


def _check_rotation(file: Path, architecture: str, values: dict[str, Any], names: set[str]) -> None:
    """Refuse scaled rotations: transformers reads the base of the rotation only, and the model would be another."""
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    factors = sorted(name for name in names if name.startswith("rope_f"))
    if scaling != "none" or factors:
        raise PhotonError(
            f"{file}: its scaled rotation ({factors[0] if factors else scaling}) is lost when transformers reads GGUF: "
            "use the model's safetensors checkpoint"
        )


def _check_quantisation(file: Path, tensor: Any, dequantize: Any) -> None:
    """Dequantise one row, so that a type nobody can read is known before minutes of work."""
    try:
        if tensor.tensor_type.name not in _STORED:
            dequantize(np.ascontiguousarray(tensor.data[:1]), tensor.tensor_type)
    except Exception as error:
        raise PhotonError(
            f"{file}: tensor {tensor.name} has quantisation {tensor.tensor_type.name}, which the package gguf cannot "
            "dequantise: use a file in Q4, Q5, Q6, Q8 or F16"
        ) from error


def _read_config(file: Path, header: _Header) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        family = family_of(config).model_type
        if LAYOUTS[family].mixer is not None:
            raise PhotonError(f"GGUF files of hybrids ({family}) are not read: use the model's safetensors checkpoint")
        check_config(config)
    except PhotonError as error:
        raise PhotonError(f"{file}: {error}") from None
    except Exception as error:
        raise PhotonError(
            f"{file}: architecture {header.architecture!r} cannot be read ({(str(error).splitlines() or [''])[0]}): "
            "use the model's safetensors checkpoint"
        ) from error
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    config.dtype = header.dtype
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))  # stored in float32: 1e-5, not 9.9999997e-6
    return config


def _load(file: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model as transformers dequantises it, without what it notes for quantised models.

    Raises:
        PhotonError: if weights are missing, or cannot be read.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=config.dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PhotonError(f"{file}: its weights cannot be read ({reason}): download it again") from error
    missing = sorted(found["missing_keys"]) + sorted(found["mismatched_keys"])
    if missing:
        raise PhotonError(f"{file} lacks tensor {missing[0]}, which its own description calls for: download it again")
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _read_tokenizer(file: Path, header: _Header) -> PreTrainedTokenizerBase:
    beside = file.parent / _TOKENIZER[0]
    try:
        if beside.is_file():
            return AutoTokenizer.from_pretrained(file.parent)
        known = header.splitting is None or header.splitting in _SPLIT_BY_TRANSFORMERS + _SPLIT_DIGITS
        if not known:
            raise ValueError(f"it splits text in the way {header.splitting!r}, which is not known")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PhotonError(
            f"{file}: its tokenizer cannot be read ({reason}): put the model's tokenizer.json and "
            "tokenizer_config.json beside it"
        ) from error
    tokenizer = _without_additions(tokenizer, header.vocabulary)
    if header.splitting in _SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if header.context_length:
        tokenizer.model_max_length = header.context_length
    return tokenizer


def _without_additions(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreTrainedTokenizerBase:
    """Drop what transformers' classes add by default (GPT-2's ``<|endoftext|>``): the embedding has no rows for it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    extra = {entry["content"] for entry in content["added_tokens"] if entry["id"] >= vocabulary}
    if not extra:
        return tokenizer
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in extra]
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token not in extra
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=tokenizer.chat_template, **special
    )
