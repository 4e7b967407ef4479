"""Which layers get memory, and where the main process runs a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tiny_checkpoint
from tiny_training import tiny_data
from transformers import AutoConfig

from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.graft import configure
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig
from photon_train.pipeline import choose, devices, run_conversion
from photon_train.pipeline.choose import choose_layers, with_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("choose") / "dense")


def settings(**photon: object) -> RunConfig:
    config = RunConfig(photon=PhotonSettings(window=16, **photon))
    config.train.seq_len = 64
    return config


def chosen(dense: Path, config: RunConfig) -> PhotonConfig:
    """The configuration with the layers that the probe chose."""
    layers = choose_layers(config, dense, tiny_data(4, seq_len=64), CPU)
    return configure(AutoConfig.from_pretrained(dense), with_layers(config, layers))


@pytest.mark.parametrize(
    ("photon", "allowed"),
    [
        ({"full_attention_layers": [0, 1]}, {2, 3}),
        ({"full_attention_layers": [2, 3], "num_memory_layers": 2}, {0, 1}),
    ],
)
def test_the_probe_leaves_layers_alone_that_cannot_have_memory(dense, photon, allowed):
    assert set(chosen(dense, settings(**photon)).memory_layers) <= allowed


def test_more_layers_than_can_have_memory_are_refused(dense):
    with pytest.raises(PhotonError, match="photon.num_memory_layers=3: 2 layers can have memory"):
        chosen(dense, settings(full_attention_layers=[0, 1], num_memory_layers=3))


def test_a_dense_model_larger_than_the_gpu_is_probed_on_request_alone(dense, monkeypatch, capsys):
    monkeypatch.setattr(choose, "roomy_device", lambda device, num_bytes: CPU)
    gpu, text = torch.device("cuda"), tiny_data(4, seq_len=64)
    assert choose_layers(settings(), dense, text, gpu) == [3]
    assert "does not fit the GPU" in capsys.readouterr().err
    choose_layers(settings(choose_layers="probe"), dense, text, gpu)
    assert "does not fit" not in capsys.readouterr().err


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
    dense, seq_len, probes, too_long, capsys
):
    config = settings()
    config.model, config.dry_run, config.train.seq_len = str(dense), True, seq_len
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("by a probe of the dense model" in printed) == probes
    assert ("train.seq_len=512 goes beyond the 256 positions" in printed) == too_long


@pytest.mark.parametrize(("layers", "alone"), [([], True), ([1], False), (None, False)])
def test_a_dry_run_says_that_there_is_no_memory(dense, layers, alone, capsys):
    config = settings(memory_layers=layers)
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("see the window and the sinks alone (StreamingLLM)" in printed) == alone


@pytest.mark.parametrize(("chunk_size", "warned"), [(2, False), (8, True)])
def test_a_dry_run_warns_of_a_memory_that_is_large_beside_its_model(dense, chunk_size, warned, capsys):
    config = settings(chunk_size=chunk_size)
    config.model, config.dry_run = str(dense), True
    run_conversion(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("photon.num_memory_layers, photon.chunk_size and photon.latents_per_unit=2" in printed) == warned
