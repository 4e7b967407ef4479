"""What survives a power failure: content is synced before it gets its name, the name before the call ends."""

from __future__ import annotations

import json
import os

import pytest
import torch
from durability import Disk
from tiny_checkpoint import byte_tokenizer
from tiny_training import tiny_data, tiny_model, tiny_run

from photon_train.config import DataSettings, RunConfig
from photon_train.conversion.apply import rewrite_new_tensors
from photon_train.conversion.safetensors_io import ShardWriter
from photon_train.data.tokenised import write_corpus
from photon_train.evaluation.plots import plot_losses
from photon_train.files import atomic_directory, atomic_file, atomic_write_text, make_directory
from photon_train.manifest import write_manifest
from photon_train.pipeline.stages import Stages
from photon_train.training.checkpoint import checkpoint_dir, latest_checkpoint
from photon_train.training.loop import train
from photon_train.training.lora import add_lora
from photon_train.training.progress import MetricsLog


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def is_safe(disk: Disk, path) -> bool:
    """Whether `path` is on the disk, and nothing got its name too early."""
    assert not disk.early and not disk.lost(path)
    return True


def test_a_file_written_carelessly_would_be_lost(disk, tmp_path):
    """The checks themselves can fail, in every way in which something can be forgotten."""
    half, whole, named = tmp_path / "half", tmp_path / "whole", tmp_path / "named"
    with open(half, "w") as file:
        file.write("a")
        os.fsync(file.fileno())  # still in Python's buffer
    os.replace(half, named)
    assert disk.early == [f"content {half} -> {named}"]
    assert disk.lost(named) == [f"name {named}", f"content {named}"]
    with open(whole, "w") as file:
        file.write("a")
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, named)
    assert len(disk.early) == 1 and disk.lost(named) == [f"name {named}"]
    handle = os.open(tmp_path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    assert not disk.lost(named) and disk.lost(tmp_path)[0] == f"name {tmp_path}"


def test_a_file(disk, tmp_path):
    path = tmp_path / "file"
    for text in ("old", "new"):
        atomic_write_text(path, text)
        assert is_safe(disk, path)
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"newest")
    assert is_safe(disk, path) and path.read_bytes() == b"newest"


def test_a_directory_with_all_that_is_in_it(disk, tmp_path):
    path = tmp_path / "deep" / "deeper" / "stage"
    for text in ("old", "new"):
        with atomic_directory(path) as directory:
            (directory / "inside" / "further").mkdir(parents=True)
            for name in ("a", "inside/b", "inside/further/c"):
                (directory / name).write_text(text)
        assert is_safe(disk, path)
    assert not disk.lost(tmp_path / "deep"), "directories made on the way have names that last too"


def test_directories(disk, tmp_path):
    make_directory(tmp_path / "one" / "two")
    make_directory(tmp_path / "one" / "two")
    assert is_safe(disk, tmp_path / "one")


def test_the_order_of_calls(tmp_path, monkeypatch):
    """Content, then the name; the directory last."""
    calls = []

    def recorded(name, describe):
        original = getattr(os, name)

        def call(*arguments):
            calls.append((name, describe(*arguments)))
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    recorded("fsync", lambda handle: "directory" if os.path.isdir(f"/dev/fd/{handle}") else "file")
    recorded("replace", lambda source, target: os.path.basename(target))
    atomic_write_text(tmp_path / "a", "text")
    assert calls == [("fsync", "file"), ("replace", "a"), ("fsync", "directory")]
    calls.clear()
    with atomic_directory(tmp_path / "stage") as directory:
        (directory / "b").write_text("text")
    assert calls == [("fsync", "file"), ("fsync", "directory"), ("replace", "stage"), ("fsync", "directory")]


def test_a_manifest_and_the_record_of_stages(disk, tmp_path):
    (tmp_path / "stage").mkdir()
    write_manifest(tmp_path / "stage", "converted", {}, {})
    assert is_safe(disk, tmp_path / "stage" / "manifest.json")
    config = RunConfig(output=str(tmp_path / "new" / "run"))
    stages = Stages(config, writes=True)
    stages.begin(config)
    assert is_safe(disk, tmp_path / "new" / "run") and not disk.lost(tmp_path / "new")
    stages.run("convert", lambda: {})
    assert is_safe(disk, tmp_path / "new" / "run" / "stages.json")


def test_a_shard_before_it_is_closed(disk, tmp_path):
    with ShardWriter(tmp_path / "shard", {"a": (1000,)}, torch.float32) as writer:
        writer.write("a", [torch.ones(600), torch.ones(400)])
    assert not any("content" in missing for missing in disk.lost(tmp_path / "shard"))


def test_a_rewritten_shard(disk, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"new": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"new": "model-2.safetensors"}}))
    rewrite_new_tensors(tmp_path, {"new": torch.ones(3)})
    assert is_safe(disk, tmp_path / "model-2.safetensors")
    assert load_file(tmp_path / "model-2.safetensors")["new"].tolist() == [1, 1, 1]


def test_a_corpus(disk, tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(5):
        (tmp_path / "text" / f"{index}.txt").write_text(f"text {index}")
    corpus = tmp_path / "corpora" / "mine"
    write_corpus(str(tmp_path / "text"), DataSettings(), byte_tokenizer(), corpus, documents_per_shard=2)
    assert is_safe(disk, corpus) and not disk.lost(tmp_path / "corpora")


def test_checkpoints_and_what_they_go_on_from(disk, tmp_path):
    config = tiny_run(max_steps=4, save_every=2, keep_checkpoints=1)
    model = add_lora(tiny_model("llama"), config.lora, config.seed)
    output = tmp_path / "new" / "run"
    train(model, tiny_data(14), tiny_data(7), config, output, name="student")
    assert is_safe(disk, latest_checkpoint(checkpoint_dir(output, "student")))
    for path in (output / "checkpoints", output / "metrics.jsonl"):
        assert not disk.lost(path)


def test_records_of_a_training_one_by_one(disk, tmp_path):
    log = MetricsLog(tmp_path / "run", "student", start_step=0, writes=True)
    for step in (1, 2):
        log.add({"step": step})
        assert is_safe(disk, tmp_path / "run" / "metrics.jsonl")


def test_a_plot(disk, tmp_path):
    record = {"name": "photon", "step": 1, "train/loss": 2.0, "eval/ce": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    assert is_safe(disk, tmp_path / "losses.png")
