"""Before anything is computed: the dense checkpoint, the plan, the estimate and the text."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from photon_train.accounting import Estimate, TrainingSetup, costs_of, estimate
from photon_train.config import DataSettings, RunConfig
from photon_train.conversion.families import dense_tensors
from photon_train.conversion.plan import ConversionPlan
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.corpora import data_files, read_documents, split_documents
from photon_train.data.identity import local_source
from photon_train.data.mixture import Mixture
from photon_train.data.packing import PackedDataset, check_alignment, pack
from photon_train.data.pretrain import PretrainSettings
from photon_train.data.retrieval_share import RetrievalShare
from photon_train.data.tokenised import Corpus, CorpusDataset, is_corpus, write_corpus
from photon_train.data.tokenizers import check_tokenizer, tokenizer_for
from photon_train.errors import PhotonError
from photon_train.files import parse_size
from photon_train.pipeline.console import make_console
from photon_train.training.accelerator import resolve_precision
from photon_train.training.base_bits import check_base_bits
from photon_train.training.lora import check_targets

# Text of a hub data set that is read, in characters per token needed: more than any tokenizer's average.
_CHARACTERS_PER_TOKEN = 8
# Of a text in memory while it is packed: as it is read, as tokens, and the tokens joined.
_COPIES = 3
# New parameters, as a share of the dense model's, that a dry run warns of.
_MANY_NEW = 0.25


@dataclass
class Conversion:
    """A checkpoint and what is to become of it."""

    checkpoint: DenseCheckpoint
    config: PretrainedConfig
    plan: ConversionPlan
    estimate: Estimate


def demo_checkpoint() -> DenseCheckpoint:
    """The demo's dense model as configuration alone, for an estimate before it is trained."""
    config = PretrainSettings().model_config(eos_id=0)
    tensors = {name: TensorInfo(shape, torch.float32, None) for name, shape in dense_tensors(config).items()}
    return DenseCheckpoint(Path("demo"), config, tensors)


def plan_conversion(checkpoint: DenseCheckpoint, config: RunConfig, num_processes: int) -> Conversion:
    """Plan and estimate; no weight is read.

    Raises:
        PhotonError: for settings that the preset or the model cannot serve.
    """
    photon = photon_config(checkpoint.config, config)
    document_alignment(photon, config)
    plan = make_plan(checkpoint, photon, config.export.dtype)
    numbers = estimate_training(checkpoint.config, photon, config, num_processes, plan.torch_dtype.itemsize)
    return Conversion(checkpoint, photon, plan, numbers)


def estimate_training(
    dense: Any, photon: PretrainedConfig, config: RunConfig, num_processes: int, dtype_bytes: int | None = None
) -> Estimate:
    """The estimate of a run; `dtype_bytes` defaults to the type that the PHOTON configuration states.

    Raises:
        PhotonError: if `lora.target_modules` or `train.base_bits` do not fit the model.
    """
    check_targets(config.lora, dense)
    check_base_bits(config.train, dense)
    gpu = config.train.gpu_memory
    gpu_bytes = parse_size(gpu) if gpu else _detected_gpu()
    precision = config.train.mixed_precision
    if precision == "auto" and gpu_bytes:
        precision = "bf16"
    setup = training_setup(config, num_processes, dtype_bytes or getattr(photon.dtype, "itemsize", 4), precision)
    return estimate(dense, photon, setup, gpu_bytes)


def document_alignment(photon: PretrainedConfig, config: RunConfig) -> int:
    """Tokens to whose multiples documents are aligned, so that no unit holds tokens of two; 1 does not align.

    Isolated documents need not be aligned: each counts units from its own first token.

    Raises:
        PhotonError: if `train.seq_len` is no multiple of them.
    """
    settings = config.dataset
    align = costs_of(photon).unit if settings.align_documents and not settings.isolate_documents else 1
    check_alignment(config.train.seq_len, align)
    return align


def training_setup(config: RunConfig, num_processes: int, weight_bytes: int, precision: str = "auto") -> TrainingSetup:
    """What the memory of a run's fine-tuning depends on; ZeRO as `accelerate launch` was told."""
    stage, offload = _deepspeed_stage()
    return TrainingSetup(
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        rank=config.lora.rank,
        target_modules=None if config.lora.target_modules is None else tuple(config.lora.target_modules),
        weight_bytes=weight_bytes,
        precision=resolve_precision(precision),
        zero_stage=stage,
        num_processes=num_processes,
        offload=offload,
        gradient_checkpointing=config.train.gradient_checkpointing,
        accumulates=config.train.gradient_accumulation_steps > 1,
        distill=bool(config.distill.weight),
        distill_hidden=bool(config.distill.hidden_weight),
        base_bits=config.train.base_bits,
    )


def _detected_gpu() -> int | None:
    """Bytes of the smallest GPU present."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def data_name(config: RunConfig) -> str:
    """Where the text of a run comes from, for the report."""
    if config.dataset.sources:
        total = sum(source.weight for source in config.dataset.sources)
        return ", ".join(f"{source.path} ({source.weight / total:.0%})" for source in config.dataset.sources)
    return config.data or "the Python standard library"


def show_conversion(conversion: Conversion) -> None:
    """Print the plan and the estimate."""
    console = make_console()
    console.print(conversion.plan.table())
    console.print(conversion.estimate.table())
    numbers = conversion.estimate
    if conversion.checkpoint.quantised is not None:
        console.print(str(conversion.checkpoint.quantised))
    if cast := _cast_tensors(conversion):
        console.print(
            f"The dense checkpoint is stored in several types, with {cast}: all is written in {conversion.plan.dtype}, "
            "or in what export.dtype says."
        )
    if getattr(conversion.config, "memory_cells", None) == {}:
        windowed = any(map(conversion.config.has_window, range(conversion.config.num_hidden_layers)))
        console.print(
            "No memory: photon.memory_cells is empty, so windowed layers see the window and the sinks alone "
            "(StreamingLLM). What has left the window is lost to them."
            if windowed
            else "No layer gets a window: photon.full_attention_layers keeps them all, and the cache grows as before."
        )
    if numbers.new_parameters > _MANY_NEW * numbers.dense_parameters:
        console.print(
            f"Warning: the conversion adds {numbers.new_parameters / 1e6:,.0f}M parameters, "
            f"{numbers.new_parameters / numbers.dense_parameters:.0%} of the dense model's, which are trained in full. "
            "Those of a memory fall with photon.memory_budget, photon.chunk_size and photon.latents_per_unit=2."
        )
    seq_len, known = numbers.context, conversion.checkpoint.config.max_position_embeddings
    if seq_len > known:
        console.print(
            f"Warning: train.seq_len={seq_len} goes beyond the {known} positions that the dense model was made for "
            "(max_position_embeddings): it predicts badly there, and teaches so. Lower train.seq_len, or extend the "
            "model first (rope_scaling in its config.json)."
        )


def _cast_tensors(conversion: Conversion) -> str:
    """How many tensors of each type the conversion casts, where the checkpoint has several; else nothing."""
    used = {source for entry in conversion.plan.tensors for source in entry.sources}
    counts = Counter(conversion.checkpoint.tensors[name].dtype for name in used)
    others = {dtype: count for dtype, count in counts.items() if dtype != conversion.plan.torch_dtype}
    if len(counts) < 2:
        return ""
    return ", ".join(
        f"{count} tensor{'s' if count > 1 else ''} in {str(dtype).removeprefix('torch.')}"
        for dtype, count in sorted(others.items(), key=lambda item: -item[1])
    )


def _deepspeed_stage() -> tuple[int, bool]:
    """ZeRO stage and offload that `accelerate launch` was given, from the environment it sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0, False
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return stage, os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")


@dataclass
class Text:
    """Packed text and the tokenizer that made it; `retrieval` takes the place of a share of it in training."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset | CorpusDataset | Mixture
    held_out: PackedDataset | CorpusDataset | Mixture
    retrieval: RetrievalShare | None = None

    def summary(self) -> dict[str, Any]:
        """Counts for the report."""
        return {
            "train_tokens": self.train.num_tokens,
            "train_documents": self.train.num_documents,
            "held_out_tokens": self.held_out.num_tokens,
            "packing_efficiency": self.train.packing_efficiency,
        }

    def __str__(self) -> str:
        retrieval = f"; {self.retrieval.share:.0%} of the training is synthetic retrieval" if self.retrieval else ""
        return (
            f"{self.train.num_documents:,} documents to train on, {self.train.num_tokens:,} tokens in "
            f"{len(self.train):,} sequences, {self.train.packing_efficiency:.1%} of their positions filled; "
            f"{self.held_out.num_tokens:,} tokens held out{retrieval}"
        )


def load_tokenizer(directory: Path, vocab_size: int, settings: DataSettings) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint, ready for the data.

    Raises:
        PhotonError: if there is none, it does not fit the vocabulary or the data.
    """
    tokenizer = tokenizer_for(str(directory), settings)
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


def load_text(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    align: int,
    num_processes: int,
    progress: bool,
    main_first: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> Text:
    """Read, split and pack the text of a run.

    A source is packed in memory, or with `dataset.stream` tokenised into `<output>/tokens/<number>` by the main process
    and mapped into memory by all; the directory of a tokenised corpus is mapped as it is.

    Args:
        align: Documents begin at its multiples; from `document_alignment`.
        main_first: Runs a function on the main process, then on the others.

    Raises:
        PhotonError: for text that is missing, unreadable or too little.
    """
    train, settings = config.train, config.dataset
    needed = train.max_steps * train.batch_size * train.gradient_accumulation_steps * num_processes * train.seq_len
    end, isolate = tokenizer.eos_token_id, settings.isolate_documents

    def one(number: int, source: str | None) -> tuple[Any, Any]:
        is_local = source is None or local_source(source) is not None
        most = None if is_local else needed * _CHARACTERS_PER_TOKEN
        if settings.stream and not is_corpus(source):
            directory = Path(config.output) / "tokens" / str(number)
            say = (lambda line: print(f"tokenising: {line}", file=sys.stderr, flush=True)) if progress else _silent
            main_first(partial(write_corpus, source, settings, tokenizer, directory, max_characters=most, progress=say))
            source = str(directory)
        if is_corpus(source):
            corpus = Corpus(local_source(source), tokenizer)
            chosen, held_out = corpus.split(settings.held_out_fraction)
            return (
                CorpusDataset(corpus, chosen, train.seq_len, align, end, isolate=isolate),
                CorpusDataset(corpus, held_out, train.seq_len, align, end, pad_last=True, isolate=isolate),
            )
        _check_memory(source, settings)
        documents = read_documents(source, settings, most)
        chosen, held_out = split_documents(documents, settings.held_out_fraction)
        return (
            pack(chosen, tokenizer, train.seq_len, align, end, isolate=isolate, progress=progress),
            pack(held_out, tokenizer, train.seq_len, align, end, pad_last=True, isolate=isolate, progress=progress),
        )

    if settings.sources:
        pairs = [one(number, source.path) for number, source in enumerate(settings.sources)]
        weights = [source.weight for source in settings.sources]
        text = Text(tokenizer, *(Mixture(side, weights) for side in zip(*pairs, strict=True)))
    else:
        text = Text(tokenizer, *one(0, config.data))
    if settings.retrieval_share:
        chat = settings.messages_field is not None
        text.retrieval = RetrievalShare(
            text.train, tokenizer, settings.retrieval_share, train.seq_len, config.seed, align, chat, isolate
        )
    return text


def _check_memory(source: str | None, settings: DataSettings) -> None:
    """Refuse text that the processes of this machine cannot hold: the system would end one of them without a word."""
    path = local_source(source)
    if path is None or settings.max_documents is not None or not hasattr(os, "sysconf"):
        return
    size = sum(file.stat().st_size for file in data_files(path))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, memory = _COPIES * size * processes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise PhotonError(
            f"{source} has {size / 1e9:.1f} GB: packing it in memory takes about {needed / 1e9:.0f} GB in {processes} "
            f"process{'es' if processes > 1 else ''}, this machine has {memory / 1e9:.0f} GB: set dataset.stream"
        )


def _silent(_: str) -> None:
    pass
