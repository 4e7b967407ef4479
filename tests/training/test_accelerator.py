"""What a launch asks for and the machine does not have is one line."""

from __future__ import annotations

import sys
from datetime import timedelta
from unittest import mock

import pytest
import torch
from tiny_training import tiny_run

from photon_train.errors import PhotonError
from photon_train.training import accelerator as accelerator_module
from photon_train.training.accelerator import make_accelerator


def test_more_processes_than_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(PhotonError, match="8 processes .* 2 GPUs are visible: .*num_processes"):
        make_accelerator(tiny_run(), tmp_path)


def test_a_gpu_config_without_a_gpu_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_accelerator(tiny_run(), tmp_path)
    assert not caplog.text
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    make_accelerator(tiny_run(), tmp_path)
    assert caplog.text.count("no GPU is visible") == 1 and "accelerate_configs/cpu.yaml" in caplog.text


@pytest.mark.parametrize("has_gpu", [False, True])
def test_processes_wait_for_a_main_one_that_works_alone(has_gpu, monkeypatch, tmp_path):
    """Tokenising or converting takes longer than the 10 minutes that NCCL waits for."""
    given = {}
    monkeypatch.setattr(accelerator_module, "Accelerator", lambda **kwargs: given.update(kwargs) or mock.MagicMock())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "0")
    make_accelerator(tiny_run(), tmp_path)
    (handler,) = given["kwargs_handlers"]
    assert handler.timeout >= timedelta(hours=1) and (handler.backend == "gloo") != has_gpu


class _NoToolkit:
    """DeepSpeed on a machine with a GPU and without the CUDA toolkit raises this kind of error as it is imported."""

    def find_spec(self, name, *_):
        if name == "deepspeed":
            raise OSError("CUDA_HOME does not exist, unable to compile CUDA op(s)\nTraceback")


@pytest.mark.parametrize("how", ["missing", "no toolkit"])
def test_a_deepspeed_that_cannot_be_imported(how, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if how == "missing":
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    else:
        monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
        monkeypatch.setattr(sys, "meta_path", [_NoToolkit(), *sys.meta_path])
    message = "asks for DeepSpeed, which cannot be imported .*photon-train.*CUDA_HOME"
    with pytest.raises(PhotonError, match=message) as caught:
        make_accelerator(tiny_run(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("PARALLELISM_CONFIG_SP_SIZE", "2", r"sequence parallelism \(parallelism_config_sp_size: 2\)"),
        ("PARALLELISM_CONFIG_CP_SIZE", "4", "context parallelism"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "tensor parallelism"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP.*zero3.yaml"),
    ],
)
def test_other_ways_to_divide_the_work_are_refused(variable, value, message, monkeypatch, tmp_path):
    """They would run: every process with a part of each sequence, whose chunks it would count from its own start."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(PhotonError, match=message):
        make_accelerator(tiny_run(), tmp_path)


def test_these_are_the_variables_that_accelerate_reads(monkeypatch):
    from accelerate.parallelism_config import ParallelismConfig

    for key in ("SP", "CP", "TP"):
        with monkeypatch.context() as patch:
            patch.setenv(f"PARALLELISM_CONFIG_{key}_SIZE", "2")
            assert getattr(ParallelismConfig(), f"{key.lower()}_size") == 2
