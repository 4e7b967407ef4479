"""The fine-tuning loop, for any causal LM of transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, send_to_device, set_seed
from torch import nn
from torch.optim import AdamW

from photon_train.config import RunConfig
from photon_train.data.loader import batches
from photon_train.data.packing import PackedDataset
from photon_train.data.retrieval_share import RetrievalShare
from photon_train.errors import PhotonError
from photon_train.models.liger_photon import fuse_layers
from photon_train.training.accelerator import make_accelerator
from photon_train.training.checkpoint import (
    TrainingState,
    checkpoint_dir,
    load_checkpoint,
    read_state,
    run_settings,
    save_checkpoint,
    sharding_of,
    text_hashes,
    usable_checkpoint,
)
from photon_train.training.guard import GuardState, SpikeGuard
from photon_train.training.heads import IGNORED
from photon_train.training.lora import base_model, parameter_groups
from photon_train.training.losses import LossParts, TrainingObjective, num_target_tokens
from photon_train.training.progress import MetricsLog, TrainingProgress
from photon_train.training.schedule import learning_rates
from photon_train.training.settings import settings_hash
from photon_train.training.shards import is_sharded, shard
from photon_train.training.tracking import alert, log_metrics, tracked

_PARTS = tuple(part.name for part in fields(LossParts))


@dataclass
class TrainResult:
    """What a training leaves.

    Attributes:
        model: The model as training holds it (wrapped, perhaps sharded): for `collect.gather_full_model`, and valid
            until the next `train` with the same accelerator.
        history: The records of `metrics.jsonl`, with `step` and `train/...` or `eval/...` keys (main process).
        metrics: The last of each: `eval/ce`, `eval/perplexity`, `train/...`.
        initial_ce: Held-out cross-entropy before the first step (nats per token).
        steps: Optimiser steps done.
        tokens: Tokens read over all processes.
        seconds: Time in training including evaluations, over all attempts.
        checkpoint: The last checkpoint.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    initial_ce: float
    steps: int
    tokens: int
    seconds: float
    checkpoint: Path


def enable_checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if base_model(model) is not model:
        # With frozen embeddings nothing before the first adapter asks for a gradient.
        model.enable_input_require_grads()


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, dataset: PackedDataset, config: RunConfig) -> float:
    """Mean cross-entropy per target token of the first `train.eval_sequences` of `dataset`, over all processes.

    Args:
        accelerator: From `make_accelerator`.
        objective: A `TrainingObjective`, prepared or not.
        dataset: Held-out sequences.
        config: Gives the number of sequences and the batch size.

    Raises:
        PhotonError: if no token of the sequences is a target.
    """
    count = min(config.train.eval_sequences, len(dataset))
    size, processes = config.train.batch_size, accelerator.num_processes
    one = torch.ones((), dtype=torch.long, device=accelerator.device)
    sums = torch.zeros(2, device=accelerator.device)
    was_training = objective.training
    objective.eval()
    # Every process runs every round, since sharded parameters are gathered in step; sequences past the end are masked.
    for first in range(0, count, size * processes):
        indices = first + accelerator.process_index * size + torch.arange(size)
        batch = dataset.batch(indices.clamp(max=count - 1))
        batch["labels"][indices >= count] = IGNORED
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():  # an objective that was not prepared is judged at the same precision
            sums[0] += objective(**batch, target_tokens=one, sequences=one)["ce"]
        sums[1] += num_target_tokens(batch["labels"])
    objective.train(was_training)
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    if not tokens:
        raise PhotonError("evaluation: no token of the held-out sequences is a target; give more held-out text")
    return total / tokens


def prepare_for_evaluation(accelerator: Accelerator, objective: nn.Module) -> nn.Module:
    """`objective` ready for `evaluate` without a training: on this process's device, with ZeRO-3 in shards.

    A model that is trained in shards need not fit one GPU. The next `train` releases it.
    """
    if is_sharded(accelerator):
        shard(accelerator, objective)
        return accelerator.prepare(objective)
    return objective.to(accelerator.device)


@dataclass
class _Run:
    """The objects of one training, prepared."""

    accelerator: Accelerator
    config: RunConfig
    objective: nn.Module
    optimizer: Any
    scheduler: Any
    guard: SpikeGuard
    trained: list[nn.Parameter] = field(default_factory=list)

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[LossParts, float, int]:
        """One optimiser step: the loss parts over all processes, the gradient norm and the tokens read.

        The guard's `reason` then tells whether the step was skipped.
        """
        accelerator = self.accelerator
        # One reduction gives what this step's sums are divided by, before anything is run.
        counts = torch.stack(
            [
                sum(num_target_tokens(batch["labels"]) for batch in micro_batches),
                torch.tensor(sum(batch["input_ids"].shape[0] for batch in micro_batches)),
                torch.tensor(sum(batch["input_ids"].numel() for batch in micro_batches)),
            ]
        )
        counts = accelerator.reduce(counts.to(accelerator.device), "sum")
        target_tokens, sequences = counts[0].clamp(min=1), counts[1]
        sums = torch.zeros(len(_PARTS), device=accelerator.device)
        present: set[str] = set()
        for batch in micro_batches:
            with accelerator.accumulate(self.objective):
                batch = send_to_device(batch, accelerator.device)
                parts = self.objective(**batch, target_tokens=target_tokens, sequences=sequences)
                present |= set(parts)
                sums += torch.stack(
                    [parts[name].detach().float() if name in parts else sums.new_zeros(()) for name in _PARTS]
                )
                if accelerator.sync_gradients:
                    # Known before the last backward pass: DeepSpeed takes its step inside of it.
                    values = dict(zip(_PARTS, accelerator.reduce(sums, "sum").tolist(), strict=True))
                    self.guard.see_loss(values["total"])
                # accelerate and DeepSpeed average over micro-batches and processes; the parts are shares of a sum.
                scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
                accelerator.backward(parts["total"] * scale)
                if accelerator.sync_gradients:
                    self._close_gradients()
                if self.guard.reason is None:
                    self.optimizer.step()
                elif accelerator.scaler is not None and accelerator.sync_gradients:
                    accelerator.scaler.update()  # it has unscaled and expects a step
                self.optimizer.zero_grad()
        if self.guard.reason is None and not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        loss = LossParts(**{name: values[name] for name in _PARTS if name in present})
        return loss, self.guard.norm, int(counts[2])

    def _close_gradients(self) -> None:
        """Clip, and let the guard judge the norm (DeepSpeed has done both)."""
        accelerator = self.accelerator
        norm = accelerator.clip_grad_norm_(self.trained, self.config.train.max_grad_norm)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            # One process decides for all.
            norm = torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)
            self.guard.see_norm(broadcast(norm).item())
        elif accelerator.optimizer_step_was_skipped and self.guard.reason is None:
            self.guard.see_norm(math.inf)
        elif math.isnan(self.guard.norm):
            self.guard.norm = float(norm)  # an optimiser that the guard cannot watch


def _prepare(model: nn.Module, config: RunConfig, accelerator: Accelerator, teacher: nn.Module | None) -> _Run:
    train = config.train
    if train.gradient_checkpointing:
        enable_checkpointing(model)
    fuse_layers(model)
    objective = TrainingObjective(model, config.distill, config.consistency, teacher)
    _widen(objective, accelerator)
    if is_sharded(accelerator):
        shard(accelerator, objective)
    optimizer = AdamW(parameter_groups(model, train), lr=train.learning_rate)
    scheduler = learning_rates(optimizer, train)
    objective, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    guard = SpikeGuard(train, GuardState(), accelerator.mixed_precision == "fp16")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        guard.watch_zero(objective.optimizer)
    return _Run(accelerator, config, objective, optimizer, scheduler, guard, trained)


def _widen(objective: nn.Module, accelerator: Accelerator) -> None:
    """Train in fp32 what a checkpoint holds in 16 bits, which have too few digits to add small updates to.

    Frozen weights stay as they are where mixed precision reconciles the types; DeepSpeed then has its own fp32 copies.
    """
    is_mixed = accelerator.mixed_precision != "no"
    if is_mixed and accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    for parameter in objective.parameters():
        # Codes of a quantised weight are whole numbers.
        if (parameter.requires_grad or not is_mixed) and parameter.itemsize < 4 and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def train(
    model: nn.Module,
    train_set: PackedDataset,
    eval_set: PackedDataset,
    config: RunConfig,
    output_dir: str | Path,
    *,
    accelerator: Accelerator | None = None,
    teacher: nn.Module | None = None,
    retrieval: RetrievalShare | None = None,
    name: str = "photon",
    extra_log: dict[str, Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train the parameters of `model` that require a gradient: AdamW, warm-up and cosine, evaluation, checkpoints.

    With `config.resume` it goes on from the newest complete checkpoint of `name` in `output_dir`, if there is one:
    on one machine the losses are then exactly those of an uninterrupted run.

    Args:
        model: A causal LM of transformers, with `lora.add_lora` applied. With ZeRO-3 the main process's weights count:
            others may hold a `shards.empty_model`.
        train_set: Sequences, read in an order that depends on `config.seed` alone.
        eval_set: Held-out sequences.
        config: The run.
        output_dir: Receives `metrics.jsonl`, `checkpoints/<name>/` and the tracker's files.
        accelerator: From `make_accelerator`; what an earlier `train` prepared with it is released. Unset makes one.
        teacher: The dense model for distillation, where `model` does not hold it.
        retrieval: Synthetic sequences that take the place of a share of `train_set`.
        name: Names this training among those of the run.
        extra_log: Entries for the tracker's configuration and each evaluation, such as the KV ratio.
        on_step: Called after each optimiser step (and its checkpoint) with the number of steps done.

    Raises:
        PhotonError: for settings that do not fit, a checkpoint of another run, and too many skipped steps.
    """
    settings, output_dir = config.train, Path(output_dir)
    accelerator = accelerator or make_accelerator(config, output_dir)
    accelerator.free_memory()
    set_seed(config.seed, device_specific=True)
    run = _prepare(model, config, accelerator, teacher)
    processes = accelerator.num_processes
    bound = run_settings(config, name, processes, text_hashes(train_set, eval_set), sharding_of(accelerator))
    state = TrainingState(num_processes=processes, settings=bound, settings_hash=settings_hash(bound))
    directory = checkpoint_dir(output_dir, name)
    saved = usable_checkpoint(accelerator, directory, settings.keep_checkpoints) if config.resume else None
    if saved is not None:
        state = read_state(saved, bound)
        load_checkpoint(accelerator, saved, state, config.seed)
        state.num_processes = processes
        run.guard.state = GuardState(**state.guard)
    is_main, start = accelerator.is_main_process, state.step
    log = MetricsLog(output_dir, name, start, is_main)
    progress = TrainingProgress(name, settings.max_steps, start, is_main)
    began, seconds_before = time.perf_counter(), state.seconds

    def record(values: dict[str, Any], seconds_left: float | None = None) -> None:
        values = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        log.add({"step": state.step, **values})
        log_metrics(accelerator, values, state.step)
        progress.show({"step": state.step, **values}, seconds_left)
        state.metrics.update(values)

    def evaluation() -> float:
        ce = evaluate(accelerator, run.objective, eval_set, config)
        if not math.isfinite(ce):
            raise PhotonError(f"{name}: the held-out cross-entropy at step {state.step} is {ce}: the weights overflow")
        if ce < state.best_ce:
            state.best_ce, state.best_step = ce, state.step
        record({"eval/ce": ce, "eval/perplexity": math.exp(min(ce, 80.0)), **(extra_log or {})})
        return ce

    def close_step() -> bool:
        """Count a skipped step, say so, and end a run that has skipped too many."""
        try:
            reason = run.guard.close(state.step)
        except PhotonError as error:
            alert(accelerator, "Training diverged", str(error))
            raise
        if reason is not None:
            alert(accelerator, "Step skipped", f"{name} step {state.step}: {reason}")
            progress.console.print(f"{name} step {state.step} skipped: {reason}", soft_wrap=True)
        return reason is not None

    with tracked(accelerator, config, output_dir, name, extra_log, start), progress:
        if saved is None:
            state.initial_ce = evaluation()
        run.objective.train()
        data = batches(
            train_set,
            config.seed,
            settings.batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            start,
            retrieval,
        )
        window_began, window_tokens = time.perf_counter(), 0
        while state.step < settings.max_steps:
            rate = run.scheduler.get_last_lr()[0]
            loss, norm, tokens = run.step(next(data))
            state.step += 1
            state.tokens += tokens
            window_tokens += tokens
            progress.advance(state.step)
            is_last = state.step == settings.max_steps
            skipped = close_step()
            if state.step % settings.log_every == 0 or is_last or skipped:
                elapsed = time.perf_counter() - window_began
                record(
                    {
                        "train/loss": loss.total,
                        **{f"train/{part}": value for part, value in asdict(loss).items() if part != "total"},
                        "train/learning_rate": rate,
                        "train/grad_norm": norm,
                        "train/skipped_steps": run.guard.state.skipped or None,
                        "train/tokens_per_second": window_tokens / elapsed,
                        "train/tokens": state.tokens,
                    },
                    (time.perf_counter() - began) / (state.step - start) * (settings.max_steps - state.step),
                )
                window_began, window_tokens = time.perf_counter(), 0
            if is_last or (settings.eval_every and state.step % settings.eval_every == 0):
                paused = time.perf_counter()
                evaluation()
                window_began += time.perf_counter() - paused
            if is_last or (settings.save_every and state.step % settings.save_every == 0):
                paused = time.perf_counter()
                state.seconds = seconds_before + time.perf_counter() - began
                state.guard = asdict(run.guard.state)
                saved = save_checkpoint(accelerator, directory, state, settings.keep_checkpoints)
                window_began += time.perf_counter() - paused
            if on_step is not None:
                on_step(state.step)
    return TrainResult(
        model=run.objective,
        history=log.history,
        metrics=state.metrics,
        initial_ce=state.initial_ce,
        steps=state.step,
        tokens=state.tokens,
        seconds=seconds_before + time.perf_counter() - began,
        checkpoint=saved,
    )
