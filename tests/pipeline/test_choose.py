"""Which cells get memory, and where the main process runs a whole model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint
from transformers import AutoConfig

from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.cells import CellProbe, ProbedLoss
from photon_train.conversion.graft import configure
from photon_train.data.packing import IGNORED_LABEL, PackedDataset
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig
from photon_train.pipeline import choose, devices, run_conversion
from photon_train.pipeline.choose import choose_cells, probe_texts, with_cells
from photon_train.pipeline.prepare import Text

CPU = torch.device("cpu")
NUMBERS = "".join(f"{number} and then {number * number}, " for number in range(2000))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("choose") / "dense")


@pytest.fixture
def settings(tmp_path):
    def run(seq_len: int = 64, **photon: object) -> RunConfig:
        # One cell in 16 bits and units of 2 tokens is a sixteenth of the eight that the dense model has.
        config = RunConfig(output=str(tmp_path), photon=PhotonSettings(window=16, **photon))
        config.train.seq_len = seq_len
        return config

    return run


def text(seq_len: int = 64, count: int = 8) -> Text:
    ids = torch.tensor(byte_tokenizer()(NUMBERS)["input_ids"][: count * seq_len]).view(count, seq_len).int()
    filler = torch.zeros_like(ids, dtype=torch.bool)
    filler[:, -5:] = True
    packed = PackedDataset(ids, filler, num_documents=1)
    return Text(byte_tokenizer(), packed, packed)


def chosen(dense: Path, config: RunConfig) -> PhotonConfig:
    """The configuration with the cells that the probe chose."""
    cells = choose_cells(config, dense, text(config.train.seq_len), CPU)
    return configure(AutoConfig.from_pretrained(dense), with_cells(config, cells))


def number_of(cells: dict[int, list[int]]) -> int:
    return sum(map(len, cells.values()))


def test_the_probe_chooses_as_many_cells_as_the_budget_pays_for(dense, settings, monkeypatch):
    best = [[-0.1, -0.2], [-0.5, -0.05], [-0.01, -0.3], [0.1, 0.2]]
    found = CellProbe(16, 4, {"text": ProbedLoss(3.0, 4.0, 0.1, best)})
    monkeypatch.setattr(choose, "probe_cells", lambda *args, **options: found)
    in_16_bits = {"memory_bits": 16, "chunk_size": 2}
    for budget, cells in ((6.25, {1: [0]}), (12.5, {1: [0], 2: [1]}), (20, {0: [1], 1: [0], 2: [1]})):
        config = settings(memory_budget=budget, **in_16_bits)
        photon = chosen(dense, config)
        assert photon.memory_cells == cells
        assert photon.window == 16 and photon.memory_bits == 16
    assert CellProbe.from_json((Path(config.output) / "probe.json").read_text()) == found
    assert number_of(chosen(dense, settings(memory_budget=100, chunk_size=8)).memory_cells) == 8


@pytest.mark.parametrize(
    ("photon", "allowed"),
    [({"full_attention_layers": [0, 1]}, {2, 3}), ({"full_attention_layers": [2, 3]}, {0, 1})],
)
def test_the_probe_leaves_layers_alone_that_cannot_have_memory(dense, settings, photon, allowed):
    config = settings(memory_budget=100, **photon)
    assert set(chosen(dense, config).memory_cells) == allowed
    found = CellProbe.from_json((Path(config.output) / "probe.json").read_text())
    for loss in found.losses.values():
        assert {layer for layer, heads in enumerate(loss.gradients) if any(heads)} == allowed


def test_a_budget_below_one_cell_is_refused(dense, settings):
    with pytest.raises(PhotonError, match="photon.memory_budget=0.1 pays for no memory cell"):
        chosen(dense, settings(memory_budget=0.1))


def test_cells_are_the_plans_where_the_window_costs_nothing(dense, settings, monkeypatch, capsys):
    found = CellProbe(16, 4, {"text": ProbedLoss(3.0, 3.0, 0.1, [[-0.5, -0.2]] * 4)})
    monkeypatch.setattr(choose, "probe_cells", lambda *args, **options: found)
    config = settings(memory_budget=7)
    planned = configure(AutoConfig.from_pretrained(dense), config).memory_cells
    assert chosen(dense, config).memory_cells == planned and planned
    assert "costs this model nothing on this text" in " ".join(capsys.readouterr().err.split())


def test_the_probe_says_beforehand_how_long_it_takes(dense, settings, capsys):
    chosen(dense, settings(seq_len=128, memory_budget=20))
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Probing on 10 sequences of 128 tokens .* attention: about \d+ (s|min)\b", said)
    assert "wins back" in said


def test_texts_are_predicted_where_the_window_does_not_help():
    """Beyond the window, no filler, from the second period on, and the needle's answer alone."""
    generator = torch.Generator().manual_seed(0)
    texts = probe_texts(text(400, count=9).train, byte_tokenizer(), 16, 400, generator)
    found = {each.name: each for each in texts}
    assert {name: len(each.tokens) for name, each in found.items()} == {"text": 6, "periodic": 4, "needles": 6}
    assert found["text"].targets[0].nonzero().flatten().tolist() == list(range(17, 395))
    periodic = found["periodic"]
    assert periodic.targets[0].nonzero().flatten().tolist() == list(range(32, 400))
    assert torch.equal(periodic.tokens[:, 32:], periodic.tokens[:, :-32])
    needles = found["needles"]
    for ids, answers in zip(needles.tokens, needles.targets, strict=True):
        answer = byte_tokenizer().decode(ids[answers]).strip()
        assert len(answer) == 7 and answer.isdigit()
        assert byte_tokenizer().decode(ids[:350]).count(answer) == 1
    assert len({tuple(row.tolist()) for row in found["text"].tokens}) == 6
    names = [each.name for each in probe_texts(text().train, byte_tokenizer(), 16, 64, generator)]
    assert names == ["text", "periodic"]  # a needle takes more than the 48 tokens beyond the window


def test_text_without_a_predicted_token_is_left_out():
    packed = text().train
    packed.filler[:] = True
    assert (packed.batch(torch.arange(2))["labels"] == IGNORED_LABEL).all()
    names = [each.name for each in probe_texts(packed, byte_tokenizer(), 16, 64, torch.Generator().manual_seed(0))]
    assert names == ["periodic"]


def test_a_dense_model_larger_than_the_gpu_is_probed_on_the_cpu(dense, settings, monkeypatch, capsys):
    monkeypatch.setattr(choose, "roomy_device", lambda device, num_bytes: CPU)
    assert choose_cells(settings(memory_budget=20), dense, text(), torch.device("cuda"))
    assert "does not fit the GPU whole and is probed on the CPU" in " ".join(capsys.readouterr().err.split())


def test_a_model_runs_on_the_gpu_where_there_is_room_for_it(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24_000, 80_000))
    assert devices.roomy_device(gpu, 15_000) == gpu
    assert devices.roomy_device(gpu, 16_000) == CPU
    assert devices.roomy_device(CPU, 16_000) == CPU


def test_weights_are_counted_once(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"1234")
    assert devices.weight_bytes(tmp_path) == 8


@pytest.mark.parametrize(("seq_len", "probes", "too_long"), [(16, False, False), (256, True, False), (512, True, True)])
def test_a_dry_run_says_what_its_plan_leaves_open_and_what_the_model_cannot_read(
    dense, settings, seq_len, probes, too_long, capsys
):
    config = settings(seq_len, memory_budget=7)
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("by a probe of the dense model" in printed) == probes
    assert ("train.seq_len=512 goes beyond the 256 positions" in printed) == too_long


@pytest.mark.parametrize(("photon", "alone"), [({"memory_cells": []}, True), ({"memory_cells": ["1:0"]}, False)])
def test_a_dry_run_says_that_there_is_no_memory(dense, settings, photon, alone, capsys):
    config = settings(**photon)
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("see the window and the sinks alone (StreamingLLM)" in printed) == alone


def test_a_dry_run_of_full_layers_alone_speaks_of_no_window_and_no_probe(dense, settings, capsys):
    layers = range(AutoConfig.from_pretrained(dense).num_hidden_layers)
    config = settings(256, full_attention_layers=list(layers))
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert "No layer gets a window" in printed and "alone" not in printed and "probe" not in printed


@pytest.mark.parametrize(("chunk_size", "warned"), [(2, False), (8, True)])
def test_a_dry_run_warns_of_a_memory_that_is_large_beside_its_model(dense, settings, chunk_size, warned, capsys):
    config = settings(chunk_size=chunk_size, memory_cells=["3:0", "3:1"])
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("photon.memory_budget, photon.chunk_size and photon.latents_per_unit=2" in printed) == warned
