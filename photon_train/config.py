"""`RunConfig`: every setting of a run, as one dataclass tree.

Precedence: defaults < YAML (``--config``) < dotted command-line overrides. The loader lives in
`photon_train.cli`; this file imports nothing of the package, so that every stage may read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PRESETS = ("graft", "split", "paper")


@dataclass
class LevelOverrides:
    """One level of the hierarchy; level 0 of the list is the first above the tokens.

    Attributes:
        chunk_size: Units of the level below that one unit of this level summarises.
        num_slots: Conditioning vectors that one state of this level is expanded to.
        encoder_layers: Depth of the causal transformer over this level's units.
        encoder_window: Units that this level's encoder looks back on; 0 is unbounded (the top level).
        decoder_layers: Depth of the decoder that reads this level's slots.
    Unset fields take the preset's choice.
    """

    chunk_size: int | None = None
    num_slots: int | None = None
    encoder_layers: int | None = None
    encoder_window: int | None = None
    decoder_layers: int | None = None


@dataclass
class PhotonSettings:
    """The window, and what stands in for what lies outside it. Unset fields take the preset's choice.

    Attributes:
        window: Tokens that a windowed layer looks back on (`graft`, and the token stream of `split`).
        num_sinks: First tokens of each sequence that stay visible beside the window (`graft`, `split`).
        chunk_size: `graft`: tokens under one memory unit.
        memory_layers: `graft`: layers that also read the units outside the window.
        choose_layers: `graft`: how `memory_layers` are chosen where they are unset: `preset` (by their number alone),
            or `probe`: where far attention is missed most by the dense model on the run's own text. Unset probes where
            the sequences are longer than the window.
        num_memory_layers: `graft`: memory layers to choose; unset takes an eighth of all layers.
        memory_parts: `graft`: 1 packs keys and values together, 2 apart: half the arithmetic of reading and half the
            parameters; unset takes 2 where a token's keys and values are more than 4,096 numbers.
        full_attention_layers: `graft`: layers kept at full attention (growing KV each).
        num_levels: `split` and `paper`: levels above the tokens.
        levels: `split` and `paper`: settings per level, from the lowest up.
    """

    window: int | None = None
    num_sinks: int | None = None
    chunk_size: int | None = None
    memory_layers: list[int] | None = None
    choose_layers: str | None = None
    num_memory_layers: int | None = None
    memory_parts: int | None = None
    full_attention_layers: list[int] = field(default_factory=list)
    num_levels: int | None = None
    levels: list[LevelOverrides] = field(default_factory=list)


@dataclass
class SourceSettings:
    """One source of a mixture.

    Attributes:
        path: A file, a directory, the directory of a tokenised corpus, or a hub id.
        weight: Its share of the training sequences, relative to the others'.
    """

    path: str = ""
    weight: float = 1.0


@dataclass
class DataSettings:
    """The text.

    Attributes:
        sources: Several sources with weights, in place of `data`; each is read as often as its weight asks.
        messages_field: Column or key that holds conversations (lists of `role` and `content`): they are written with
            the chat template, and the loss is on what the assistant says alone.
        chat_template: File of a chat template that marks the assistant's words with generation tags; unset takes the
            tokenizer's own.
        stream: Tokenise shard by shard into `output` and map the tokens into memory, for text larger than the memory.
        text_field: Column or key that holds the text in JSONL, Parquet and hub data sets.
        hub_config: Configuration name of a hub data set.
        hub_split: Split of a hub data set.
        held_out_fraction: Share of the documents (chosen by a hash of their name) kept for evaluation.
        max_documents: Read at most this many documents; unset reads all.
        align_documents: Start every document where a unit begins, so that no unit holds the end of one document and
            the start of the next.
        num_workers: Processes that tokenise with `stream`; 0 tokenises in the main one.
    """

    sources: list[SourceSettings] = field(default_factory=list)
    messages_field: str | None = None
    chat_template: str | None = None
    stream: bool = False
    text_field: str = "text"
    hub_config: str | None = None
    hub_split: str = "train"
    held_out_fraction: float = 0.05
    max_documents: int | None = None
    align_documents: bool = True
    num_workers: int = 0


@dataclass
class TrainSettings:
    """The fine-tuning.

    Attributes:
        max_steps: Optimiser steps.
        seq_len: Tokens per sequence.
        batch_size: Sequences per process and micro-step.
        gradient_accumulation_steps: Micro-steps per optimiser step.
        learning_rate: Peak learning rate of the LoRA parameters.
        new_modules_learning_rate: Peak learning rate of the modules trained in full. A memory starts from fitted
            matrices, which a high rate destroys; the wider the model, the lower.
        weight_decay: AdamW weight decay (matrices only).
        warmup_steps: Linear warm-up steps; a cosine to 10% follows.
        max_grad_norm: Gradient clipping by global norm.
        spike_sigma: Skip a step whose loss or gradient norm lies this many standard deviations above the mean of the
            steps before it; 0 skips only what is not finite.
        spike_window: Accepted steps that mean and deviation are taken over.
        max_skipped_in_row: Skipped steps in a row that end the run.
        max_skipped_steps: Skipped steps in all that end the run.
        mixed_precision: `bf16`, `fp16`, `no` (all in fp32), or `auto`: bf16 where the hardware multiplies it natively,
            else no.
        gradient_checkpointing: Recompute activations in the backward pass.
        gpu_memory: Memory of one GPU, such as 80GiB, for which `dry_run` recommends an accelerate config; unset takes
            that of the GPU that is present.
        eval_every: Optimiser steps between evaluations; 0 evaluates at the start and the end only.
        eval_sequences: Held-out sequences per evaluation.
        log_every: Optimiser steps between log lines.
        save_every: Optimiser steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: Newest checkpoints kept on disk.
        dense_baseline: Also fine-tune the dense model the same way, for the report.
    """

    max_steps: int = 1000
    seq_len: int = 2048
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    new_modules_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    spike_sigma: float = 6.0
    spike_window: int = 128
    max_skipped_in_row: int = 5
    max_skipped_steps: int = 100
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    gpu_memory: str | None = None
    eval_every: int = 200
    eval_sequences: int = 64
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    dense_baseline: bool = True


@dataclass
class LoraSettings:
    """Low-rank adaptation of the copied stacks (peft).

    Attributes:
        rank: Rank of the update; 0 trains every weight in full.
        alpha: Scale numerator; the update is multiplied by alpha / rank.
        dropout: Dropout on the adapter's input.
        target_modules: Linear layers that get an adapter.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class DistillSettings:
    """Distillation from the dense model; without a weight no teacher runs.

    Attributes:
        weight: Weight of KL(dense || PHOTON) in the loss.
        temperature: Softmax temperature of both.
        hidden_weight: Weight of the squared error of the last hidden states (what the head reads), relative to the
            dense model's.
    """

    weight: float = 0.0
    temperature: float = 1.0
    hidden_weight: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the loss needs the dense model."""
        return bool(self.weight or self.hidden_weight)


@dataclass
class ConsistencySettings:
    """Recursive consistency (levels >= 2).

    Attributes:
        weight: Weight of 1 - cos(decoder reconstruction, encoder state) in the loss.
    """

    weight: float = 0.0


@dataclass
class TrackingSettings:
    """Experiment tracking through accelerate.

    Attributes:
        tracker: `wandb`, `tensorboard` or `none`.
        project: Project name.
        run_name: Run name; unset lets the tracker choose.
        group: Group of runs (W&B).
        mode: W&B mode: `auto` (online with a key, else offline), `online`, `offline` or `disabled`.
        artifact: The export as a W&B artifact: `reference` (the files stay where they are), `upload` or `none`.
    """

    tracker: str = "wandb"
    project: str = "photon-train"
    run_name: str | None = None
    group: str | None = None
    mode: str = "auto"
    artifact: str = "reference"


@dataclass
class ExportSettings:
    """The exported checkpoint.

    Attributes:
        max_shard_size: Largest safetensors shard.
        dtype: Weights' type on disk: `auto` (the dense checkpoint's), `float32`, `bfloat16` or `float16`.
        sample_prompt: Prompt of the text sample in the report; unset takes held-out text.
        sample_tokens: New tokens of the sample.
    """

    max_shard_size: str = "5GB"
    dtype: str = "auto"
    sample_prompt: str | None = None
    sample_tokens: int = 64


@dataclass
class HubSettings:
    """Access to the Hugging Face hub (the token is read from HF_TOKEN or the stored login).

    Attributes:
        revision: Branch, tag or commit of the model.
        token: Access token; unset uses the stored login.
    """

    revision: str | None = None
    token: str | None = None


@dataclass
class RunConfig:
    """A conversion run.

    Attributes:
        model: Dense checkpoint: a directory or a hub id; unset pretrains the small demo model.
        data: Text: a file, a directory, JSONL, Parquet or a hub id; unset reads the Python standard library.
        output: Directory that the run writes; it must be empty or belong to the same run (`--resume`).
        preset: Conversion preset: `graft`, `split` or `paper`.
        dry_run: Print the plan and the estimate, write nothing.
        resume: Go on from the newest complete checkpoint in `output`; starts anew where there is nothing yet, so a
            command that has it can be repeated as it is after a kill.
        seed: Seed of everything that is drawn.
    """

    model: str | None = None
    data: str | None = None
    output: str = "runs/photon"
    preset: str = "graft"
    dry_run: bool = False
    resume: bool = False
    seed: int = 0
    photon: PhotonSettings = field(default_factory=PhotonSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)
    dataset: DataSettings = field(default_factory=DataSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    hub: HubSettings = field(default_factory=HubSettings)
