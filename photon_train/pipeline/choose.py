"""Memory cells chosen by a probe of the dense model on the run's own text, and on retrieval made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from photon_train.config import RunConfig
from photon_train.conversion.cells import MIDDLE, CellProbe, ProbeText, probe_cells
from photon_train.conversion.graft import configure, count_cells, format_cells, memory_candidates
from photon_train.data.packing import IGNORED_LABEL, Sequences
from photon_train.data.retrieval import longest_fact, needle_sequences, periodic_sequences, plain_text
from photon_train.files import atomic_write_text
from photon_train.pipeline.announce import announced
from photon_train.pipeline.console import make_console
from photon_train.pipeline.devices import roomy_device, weight_bytes
from photon_train.pipeline.prepare import Text

FILE_NAME = "probe.json"
SEQUENCES = {"text": 6, "periodic": 4, "needles": 6}
WINDOWS = 8  # tokens of a sequence in windows, where the run's sequences are as long


def wants_probe(config: RunConfig, planned: PretrainedConfig) -> bool:
    """Whether a probe is to choose the memory cells: nobody has named them, some layer has a window, and the text
    reaches beyond it."""
    chosen = config.preset != "graft" or config.photon.memory_cells is not None
    if chosen or not any(map(planned.has_window, range(planned.num_hidden_layers))):
        return False
    return config.train.seq_len > planned.window + 1


def with_cells(config: RunConfig, cells: list[str]) -> RunConfig:
    """`config` with these memory cells, each as layer:head."""
    photon = dataclasses.replace(config.photon, memory_cells=cells, memory_budget=None)
    return dataclasses.replace(config, photon=photon)


def choose_cells(config: RunConfig, directory: Path, text: Text, device: torch.device) -> list[str]:
    """The memory cells of a conversion: as many as `photon.memory_budget` pays for, where far attention is missed most.

    The probe is written to `probe.json` in the run's output. Where the window costs the model nothing that the probe
    can see, the cells are those of the plan.

    Args:
        config: The run.
        directory: The dense checkpoint.
        text: Of the run; training sequences are read.
        device: Where the dense model runs, if it fits there whole.

    Returns:
        Cells as layer:head.

    Raises:
        PhotonError: if the budget pays for no cell, or the text is too little to probe with.
    """
    dense = AutoConfig.from_pretrained(directory)
    planned, among = configure(dense, config), memory_candidates(dense, config.photon)
    count, console = count_cells(dense, config.photon), make_console(stderr=True)
    roomy = roomy_device(device, weight_bytes(directory))
    if roomy != device:
        console.print(
            "The dense model does not fit the GPU whole and is probed on the CPU; photon.memory_cells, from a run that "
            "has probed it, saves that."
        )
    generator = torch.Generator().manual_seed(config.seed)
    length = min(config.train.seq_len, WINDOWS * planned.window)
    texts = probe_texts(text.train, text.tokenizer, planned.window, length, generator)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation="photon").to(roomy)
    probe = run_probe(model, texts, planned.window, planned.num_sinks, among)
    atomic_write_text(Path(config.output) / FILE_NAME, probe.to_json())
    console.print(probe.table())
    if not probe.counted:
        console.print(
            f"The window of {planned.window} tokens costs this model nothing on this text: the memory cells are spread "
            "over its upper layers, not chosen."
        )
        return format_cells(planned.memory_cells)
    return format_cells(probe.best_cells(count, among))


def probe_texts(
    dataset: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    length: int,
    generator: torch.Generator,
    counts: Mapping[str, int] = SEQUENCES,
) -> list[ProbeText]:
    """What the probe's losses are taken on: text beyond the window, and retrieval made of that text.

    Needles are left out where the sequences do not hold one and the window.

    Args:
        dataset: Packed sequences of at least `length` tokens.
        window: Tokens that a restricted layer looks back on.
        length: Tokens of a sequence, more than the window by two at least.
        generator: Draws the sequences.
        counts: Sequences of `text`, `periodic` and `needles`.

    Raises:
        PhotonError: if the text is too little to make retrieval of.
    """
    batch = dataset.batch(torch.randperm(len(dataset), generator=generator)[: counts["text"]])
    ids, position = batch["input_ids"][:, :length].long(), torch.arange(length)
    is_predicted = (batch["labels"][:, :length] != IGNORED_LABEL) & (position > window)
    source = plain_text(batch["input_ids"].flatten(), tokenizer)
    # What comes again lies beyond the window, and once at least within the sequence.
    period = min(2 * window, (window + length) // 2)
    periodic = periodic_sequences(source, counts["periodic"], length, period, generator)
    texts = [
        ProbeText("text", ids, is_predicted),
        ProbeText("periodic", periodic, (position >= period).expand(len(periodic), -1)),
    ]
    if length >= window + longest_fact(tokenizer):
        texts.append(ProbeText("needles", *needle_sequences(source, tokenizer, counts["needles"], length, generator)))
    return [text for text in texts if text.targets.any()]


def run_probe(
    model: PreTrainedModel,
    texts: list[ProbeText],
    window: int,
    num_sinks: int,
    layers: Collection[int],
    gate: float = MIDDLE,
) -> CellProbe:
    """`probe_cells` with a progress bar, and how long it will take once the first pass has been timed."""
    number, length = sum(len(text.tokens) for text in texts), texts[0].tokens.shape[1]
    sentence = f"Probing on {number} sequences of {length:,} tokens which cells miss far attention"
    with announced("probing cells", sentence) as report:
        return probe_cells(model, texts, window, num_sinks, layers, gate, report)
