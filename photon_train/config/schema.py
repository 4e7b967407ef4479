"""`RunConfig`: every setting of a run, declared once: type, default, bounds, choices, meaning, what it excludes.

Declared with pydantic, which the server depends on anyway. jsonargparse and draccus were tried: neither sets one item
of a list by a dotted key or reads ``0,2`` as a list, and their errors take several lines.

The text below a field is what ``--help`` says. Settings can be assigned (``config.train.max_steps = 3``) and copied
with `dataclasses.replace`; both check and raise `pydantic.ValidationError`. `load_config` raises `PhotonError`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic.dataclasses import dataclass

from photon_train.files import expand_path, parse_size


def _number(value: Any) -> Any:
    """str that spells a number counts as the number, and 1e3 as a whole one."""
    if isinstance(value, str):
        for kind in (int, float):  # as a float a long whole number would lose its last digits
            try:
                value = kind(value)
                break
            except ValueError:
                continue
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _expected(words: str) -> Any:
    """What errors say is expected, where the type alone does not say it."""
    return Field(json_schema_extra={"expected": words})


def _size(value: str) -> str:
    parse_size(value)
    return value


def _once(items: list) -> list:
    if len(set(items)) != len(items):
        raise ValueError("an item stands twice")
    return items


_NUMBER = BeforeValidator(_number)
MOST_COUNT, MOST_FLOAT = 2**30, 1e30  # beyond them int32 and float32 overflow in the middle of a run
Count = Annotated[int, Strict(), Ge(1), Le(MOST_COUNT), _NUMBER]
Natural = Annotated[int, Strict(), Ge(0), Le(MOST_COUNT), _NUMBER]
Positive = Annotated[float, Strict(), Gt(0), Le(MOST_FLOAT), _NUMBER]
NotNegative = Annotated[float, Strict(), Ge(0), Le(MOST_FLOAT), _NUMBER]
Flag = Annotated[bool, Strict()]
Place = Annotated[
    str, MinLen(1), AfterValidator(expand_path), _expected("a path or hub id that is not empty (~user must exist)")
]
Size = Annotated[str, AfterValidator(_size), _expected("a size such as 5GB or 80GiB")]
Layers = Annotated[list[Natural], AfterValidator(_once), _expected("a list of layers, each a whole number, given once")]
Cell = Annotated[str, Field(pattern=r"^\d+:\d+$"), _expected("layer:head, two whole numbers such as 7:2")]
Cells = Annotated[
    list[Cell], AfterValidator(_once), _expected("a list of layer:head (7:2,18:0), whole numbers, each given once")
]

Preset = Literal["graft", "split", "paper"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
PRESETS, WANDB_MODES = get_args(Preset), get_args(WandbMode)

# What may differ between a run and its continuation: where things lie and what is shown, never what is computed.
FREE: dict[str, Any] = {"on_resume": "free"}
# Free as long as the product with the number of processes, the sequences of an optimiser step, is the same.
PER_STEP: dict[str, Any] = {"on_resume": "per step"}
_CHECKED = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(config=_CHECKED)
class LevelOverrides:
    """One level of the hierarchy; level 0 of the list is the first above the tokens."""

    chunk_size: Count | None = None
    """Units of the level below that are packed into one unit of this level."""
    num_slots: Count | None = None
    """Slots that one state of this level is expanded to, before what lies under it."""
    encoder_layers: Natural | None = None
    """Depth of the causal transformer over this level's units."""
    encoder_window: Natural | None = None
    """Units that this level's encoder looks back on; 0 is unbounded (the top level)."""
    decoder_layers: Natural | None = None
    """Depth of the decoder that reads this level's slots."""


@dataclass(config=_CHECKED)
class PhotonSettings:
    """The window, and the memory or the levels for what lies outside it. Unset fields take the preset's choice."""

    window: Count | None = None
    """Tokens that a windowed layer looks back on (`graft`, and the token stream of `split`)."""
    num_sinks: Natural | None = None
    """First tokens of each sequence that stay visible beside the window (`graft`, `split`)."""
    chunk_size: Count | None = None
    """`graft`: tokens under one memory unit."""
    memory_cells: Cells | None = None
    """`graft`: memory cells, each as layer:head (a layer's key-value head), whose queries also read the units outside
    the window; the empty list leaves window and sinks alone. Unset: those whose far attention the dense model misses
    most, by a probe on the run's own text (where its sequences exceed the window)."""
    memory_budget: Annotated[float, Strict(), Gt(0), Le(100), _NUMBER] | None = None
    """`graft`: what the memory may add to the cache per token, in percent of the dense model's keys and values, where
    `memory_cells` are unset."""
    memory_bits: Annotated[Literal[4, 8, 16], _NUMBER] | None = None
    """`graft`: bits in which the cache stores a number of a latent; 16 is the model's own type."""
    latents_per_unit: Annotated[int, Strict(), Ge(1), Le(2), _NUMBER] | None = None
    """`graft`: 1 packs keys and values together, 2 apart: half the arithmetic of reading and half the parameters; unset
    takes 2 where those of a layer's memory cells are more than 4,096 numbers."""
    full_attention_layers: Layers = Field(default_factory=list)
    """`graft`: layers kept at full attention (growing KV each)."""
    num_levels: Count | None = None
    """`split` and `paper`: levels above the tokens."""
    levels: list[LevelOverrides] = Field(default_factory=list)
    """`split` and `paper`: settings per level, from the lowest up."""

    @model_validator(mode="after")
    def _agrees(self) -> PhotonSettings:
        if self.memory_cells is not None and self.memory_budget is not None:
            raise ValueError("photon.memory_cells is set, and photon.memory_budget has them chosen: drop one")
        if self.num_levels is not None and len(self.levels) > self.num_levels:
            raise ValueError(
                f"photon.levels sets {len(self.levels)} levels but photon.num_levels is {self.num_levels}: raise it or "
                "drop levels"
            )
        return self


@dataclass(config=_CHECKED)
class SourceSettings:
    """One source of a mixture."""

    path: Place
    """A file, a directory, the directory of a tokenised corpus, or a hub id."""
    weight: Positive = 1.0
    """Its share of the training sequences, relative to the others'."""


@dataclass(config=_CHECKED)
class DataSettings:
    """The text."""

    sources: list[SourceSettings] = Field(default_factory=list)
    """Several sources with weights, in place of `data`; each is read as often as its weight asks."""
    messages_field: str | None = None
    """Column or key that holds conversations (lists of messages with `role`, `content` and `tool_calls`; `tools` beside
    it is read too): they are written with the chat template, and the loss is on what the assistant says alone."""
    chat_template: Place | None = None
    """File of a chat template that marks the assistant's words with generation tags; unset takes the
    tokenizer's own."""
    stream: Flag = False
    """Tokenise shard by shard into `output` and map the tokens into memory, for text larger than the memory."""
    text_field: str = "text"
    """Column or key that holds the text in JSONL, Parquet and hub data sets."""
    hub_config: str | None = None
    """Configuration name of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set."""
    held_out_fraction: Annotated[float, Strict(), Gt(0), Lt(1), _NUMBER] = 0.05
    """Share of the documents (chosen by a hash of their name) kept for evaluation."""
    max_documents: Count | None = None
    """Read at most this many documents; unset reads all."""
    retrieval_share: Annotated[float, Strict(), Ge(0), Le(1), _NUMBER] = 0.0
    """Share of the training sequences that is synthetic retrieval made of the run's own text: statements hidden in it,
    lists of keys and values, and spans that come again, each asked for later. It teaches a memory in hundreds of steps
    what ordinary text teaches in many thousands; evaluation has none of it."""
    isolate_documents: Flag = True
    """Hold the documents of a sequence apart, in training and evaluation, of PHOTON, the teacher and the dense baseline
    alike: each is computed as if it were alone. false lets them see each other."""
    align_documents: Flag = True
    """Where documents are not isolated, start every one where a unit begins, so that no unit holds the end of one
    document and the start of the next."""
    num_workers: Natural = Field(0, json_schema_extra=FREE)
    """Processes that tokenise with `stream`; 0 tokenises in the main one."""

    @model_validator(mode="after")
    def _uses_its_template(self) -> DataSettings:
        if self.chat_template is not None and self.messages_field is None:
            raise ValueError(
                "dataset.chat_template is set and no conversations are read: set dataset.messages_field to the column "
                "that holds them, or drop the template"
            )
        return self


@dataclass(config=_CHECKED)
class TrainSettings:
    """The fine-tuning."""

    max_steps: Count = 1000
    """Optimiser steps."""
    seq_len: Annotated[int, Strict(), Ge(2), Le(MOST_COUNT), _NUMBER] = 2048
    """Tokens per sequence."""
    batch_size: Count = Field(4, json_schema_extra=PER_STEP)
    """Sequences per process and micro-step."""
    gradient_accumulation_steps: Count = Field(1, json_schema_extra=PER_STEP)
    """Micro-steps per optimiser step."""
    learning_rate: Positive = 2e-4
    """Peak learning rate of the LoRA parameters."""
    new_modules_learning_rate: Positive = 1e-4
    """Peak learning rate of the modules trained in full. A memory starts from fitted matrices, which a high rate
    destroys; the wider the model, the lower."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay (matrices only)."""
    warmup_steps: Natural = 20
    """Linear warm-up steps; a cosine to 10% follows."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping by global norm."""
    spike_sigma: NotNegative = 6.0
    """Skip a step whose loss or gradient norm lies this many standard deviations above the mean of the steps before it;
    0 skips only what is not finite."""
    spike_window: Annotated[int, Strict(), Ge(2), Le(MOST_COUNT), _NUMBER] = 128
    """Accepted steps that mean and deviation are taken over."""
    max_skipped_in_row: Count = Field(5, json_schema_extra=FREE)
    """Skipped steps in a row that end the run."""
    max_skipped_steps: Count = Field(100, json_schema_extra=FREE)
    """Skipped steps in all that end the run."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """`no` is all in fp32; `auto` is bf16 where the hardware multiplies it natively, else no."""
    base_bits: Annotated[Literal[4, 16], _NUMBER] = 16
    """4: the frozen linear layers of the dense model are held in 4 bits under the adapters (QLoRA, with bitsandbytes);
    the export is made of the unrounded weights. 16: as they are."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass."""
    gpu_memory: Size | None = Field(None, json_schema_extra=FREE)
    """Memory of one GPU, such as 80GiB, for which `dry_run` recommends an accelerate config; unset takes that of
    the GPU that is present."""
    eval_every: Natural = Field(200, json_schema_extra=FREE)
    """Optimiser steps between evaluations; 0 evaluates at the start and the end only."""
    eval_sequences: Count = Field(64, json_schema_extra=FREE)
    """Held-out sequences per evaluation."""
    log_every: Count = Field(10, json_schema_extra=FREE)
    """Optimiser steps between log lines."""
    save_every: Natural = Field(500, json_schema_extra=FREE)
    """Optimiser steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Count = Field(2, json_schema_extra=FREE)
    """Newest checkpoints kept on disk."""
    dense_baseline: Flag = Field(True, json_schema_extra=FREE)
    """Also fine-tune the dense model the same way, for the report, and keep it in `dense-finetuned/`."""


@dataclass(config=_CHECKED)
class LoraSettings:
    """Low-rank adaptation of the dense model's layers (peft)."""

    rank: Natural = 16
    """Rank of the update; 0 trains every weight in full."""
    alpha: Count = 32
    """Scale numerator; the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Strict(), Ge(0), Lt(1), _NUMBER] = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | None = None
    """Linear layers that get an adapter; unset: all. ``experts`` names those of a mixture, which get none by default.
    """


@dataclass(config=_CHECKED)
class DistillSettings:
    """Distillation from the dense model; without a weight no teacher runs."""

    weight: NotNegative = 0.0
    """Weight of KL(dense || PHOTON) in the loss."""
    temperature: Positive = 1.0
    """Softmax temperature of both."""
    hidden_weight: NotNegative = 0.0
    """Weight of the squared error of the last hidden states (what the head reads), relative to the dense model's."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy beside them; 0 learns from the dense model alone."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> DistillSettings:
        if not (self.ce_weight or self.is_on):
            raise ValueError("distill.ce_weight is 0 and nothing else is learnt: set distill.weight or hidden_weight")
        return self

    @property
    def is_on(self) -> bool:
        """Whether the loss needs the dense model."""
        return bool(self.weight or self.hidden_weight)


@dataclass(config=_CHECKED)
class ConsistencySettings:
    """Recursive consistency (levels >= 2)."""

    weight: NotNegative = 0.0
    """Weight of 1 - cos(decoder reconstruction, encoder state) in the loss."""


@dataclass(config=_CHECKED)
class TrackingSettings:
    """Experiment tracking through accelerate."""

    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where metrics go besides `metrics.jsonl`."""
    project: str = "photon-train"
    """Project name."""
    run_name: str | None = None
    """Run name; unset lets the tracker choose."""
    group: str | None = None
    """Group of runs (W&B)."""
    mode: WandbMode = "auto"
    """W&B mode; `auto` is what WANDB_MODE or WANDB_DISABLED say, else online with a key, else offline."""
    artifact: Literal["reference", "upload", "none"] = "reference"
    """The export as a W&B artifact: `reference` (the files stay where they are), `upload` or `none`."""


@dataclass(config=_CHECKED)
class ExportSettings:
    """The exported checkpoint."""

    max_shard_size: Size = "5GB"
    """Largest safetensors shard."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type on disk; `auto` is the dense checkpoint's."""
    sample_prompt: Annotated[str, MinLen(1), _expected("text that is not empty")] | None = None
    """Prompt of the text sample in the report; unset takes held-out text."""
    sample_tokens: Count = 64
    """New tokens of the sample."""


@dataclass(config=_CHECKED)
class HubSettings:
    """Access to the Hugging Face hub (the token is read from HF_TOKEN or the stored login)."""

    revision: str | None = None
    """Branch, tag or commit of the model."""
    token: str | None = Field(None, exclude=True, repr=False)
    """Access token, never written; unset uses the stored login."""


@dataclass(config=_CHECKED)
class RunConfig:
    """A conversion run."""

    model: Place | None = None
    """Dense checkpoint: a directory or a hub id; unset pretrains the small demo model."""
    data: Place | None = None
    """Text: a file, a directory, JSONL, Parquet or a hub id; unset reads the Python standard library."""
    output: Place = Field("runs/photon", json_schema_extra=FREE)
    """Directory that the run writes; it must be empty or belong to the same run (`--resume`)."""
    preset: Preset = "graft"
    """Conversion preset."""
    dry_run: Flag = Field(False, json_schema_extra=FREE)
    """Print the plan and the estimate, write nothing."""
    resume: Flag = Field(False, json_schema_extra=FREE)
    """Go on from the newest complete checkpoint in `output`; starts anew where there is nothing yet, so a command that
    has it can be repeated as it is after a kill."""
    seed: Annotated[int, Strict(), Ge(0), Lt(2**32), _NUMBER] = 0
    """Seed of everything that is drawn."""
    photon: PhotonSettings = Field(default_factory=PhotonSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    distill: DistillSettings = Field(default_factory=DistillSettings)
    consistency: ConsistencySettings = Field(default_factory=ConsistencySettings)
    dataset: DataSettings = Field(default_factory=DataSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, json_schema_extra=FREE)
    export: ExportSettings = Field(default_factory=ExportSettings, json_schema_extra=FREE)
    hub: HubSettings = Field(default_factory=HubSettings)

    @model_validator(mode="after")
    def _agrees(self) -> RunConfig:
        if self.dataset.sources and self.data is not None:
            raise ValueError("data and dataset.sources are both set: name every source in dataset.sources")
        if self.train.base_bits != 16 and not self.lora.rank:
            raise ValueError(
                f"train.base_bits={self.train.base_bits} trains adapters over frozen weights, and lora.rank is 0: set "
                "lora.rank, or train.base_bits=16"
            )
        return self
