"""The main command from a dense checkpoint on disk to text from the export, through the real launcher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.conversion.cells import CellProbe
from photon_train.conversion.plan import ConversionPlan
from photon_train.manifest import verify_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
SETTINGS = {
    "--train.seq_len": 64,
    "--train.max_steps": 4,
    "--train.eval_sequences": 4,
    "--train.eval_every": 2,
    "--train.log_every": 1,
    "--train.save_every": 2,
    "--train.mixed_precision": "no",
    "--train.learning_rate": 1e-2,
    "--train.new_modules_learning_rate": 1e-2,
    "--lora.rank": 4,
    "--export.sample_tokens": 8,
}


def launch(accelerate_config: str, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a recipe through `accelerate launch`, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(CONFIGS / accelerate_config), "--main_process_port", "0"]
    command += [str(ROOT / "recipes" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=280)


def convert(directory: Path, output: Path, accelerate_config: str = "cpu.yaml", **settings: object) -> dict:
    """Convert the checkpoint in `directory` and return the report."""
    merged = {**SETTINGS, "--train.batch_size": 4, **{f"--{key}": value for key, value in settings.items()}}
    arguments = [part for pair in merged.items() for part in pair]
    text = directory.parent / "text"
    text.mkdir(exist_ok=True)
    for index in range(12):
        (text / f"{index}.txt").write_text("\n\n".join(f"line {i * index % 7} of a text" for i in range(80)))
    done = launch(
        accelerate_config,
        "convert_llama.py",
        "--model",
        directory,
        "--data",
        text,
        "--output",
        output,
        *arguments,
        DS_ACCELERATOR="cpu",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert bool(re.search(r"Fitting the new modules to [\d,]+ tokens: about \d+ (s|min)\b", said)) != (
        "--resume" in arguments
    )
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("run")
    return directory / "out", convert(tiny_checkpoint(directory / "dense"), directory / "out", **{"photon.window": 16})


@pytest.mark.distributed
@pytest.mark.slow
def test_the_output_directory_holds_every_stage(run):
    output, report = run
    for name in ("plan.json", "config.yaml", "report.md", "report.json", "metrics.jsonl", "stages.json"):
        assert (output / name).is_file(), name
    assert ConversionPlan.from_json((output / "plan.json").read_text()).preserves_dense
    for stage in ("converted", "export"):
        verify_manifest(output / stage)
    assert list((output / "checkpoints" / "photon").iterdir()) and list(output.glob("wandb/offline-run-*/*.wandb"))
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert set(report["seconds"]) == {"probe", "convert", "dense", "photon", "sample"}


@pytest.mark.distributed
@pytest.mark.slow
def test_the_report_shows_that_fine_tuning_helped(run):
    _, report = run
    loss = {row["name"]: row["cross_entropy"] for row in report["held_out"]}
    assert set(loss) == {"dense", "dense_tuned", "converted", "tuned"}
    assert loss["tuned"] < loss["converted"] - 0.05 and loss["dense_tuned"] < loss["dense"] - 0.05
    assert 0 < report["kv_ratio"] < 0.1
    assert report["export_check"]["parameters"] == report["parameters"]
    assert report["export_check"]["max_logit_difference"] < 2e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_the_export_writes_text_on_both_backends(run):
    output, report = run
    texts = {}
    for backend in ("torch", "triton"):
        done = launch(
            "cpu.yaml",
            "generate.py",
            "--model",
            output / "export",
            "--prompt",
            "line 3 of",
            "line",
            "--backend",
            backend,
            "--max-new-tokens",
            8,
            TRITON_INTERPRET="1",
        )
        assert done.returncode == 0, done.stderr
        texts[backend] = done.stdout.rsplit("---", 1)[0]
    assert texts["torch"] == texts["triton"] and "--- line 3 of\n" in texts["torch"]


@pytest.mark.distributed
@pytest.mark.slow
def test_zero_3_on_two_processes_exports_what_one_process_exports(run, tmp_path):
    """The same global batch; sharded training, gathered and merged, gives the same weights up to rounding."""
    output, report = run
    sharded = convert(
        output.parent / "dense", tmp_path / "out", "cpu_zero3.yaml", **{"train.batch_size": 2, "photon.window": 16}
    )
    assert sharded["tuned_ce"] == pytest.approx(report["tuned_ce"], rel=1e-3)
    assert sharded["dense_tuned_ce"] == pytest.approx(report["dense_tuned_ce"], rel=1e-3)
    for kind in ("export", "dense-finetuned"):
        expected, weights = (load_file(path / kind / "model.safetensors") for path in (output, tmp_path / "out"))
        assert expected.keys() == weights.keys()
        for name, tensor in expected.items():
            assert (weights[name] - tensor).abs().max() < 5e-3, name


@pytest.mark.distributed
@pytest.mark.slow
def test_the_fine_tuned_dense_model_is_kept(run):
    """With the text's loss that the report gives it, and the dense model's tensors, the adapted ones changed."""
    output, report = run
    before, after = (
        load_file(path / "model.safetensors") for path in (output.parent / "dense", output / "dense-finetuned")
    )
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert report["paths"]["fine-tuned dense model"] == str(output / "dense-finetuned")
    model = AutoModelForCausalLM.from_pretrained(output / "dense-finetuned").eval()
    ids = torch.arange(1, 40)[None]
    assert not model(ids).logits.isnan().any()
    AutoTokenizer.from_pretrained(output / "dense-finetuned")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["split", "paper"])
def test_every_other_preset_runs_to_its_export(preset, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    report = convert(dense, tmp_path / "out", preset=preset, **{"train.dense_baseline": "false"})
    assert report["tuned_ce"] < report["converted_ce"]


@pytest.mark.distributed
@pytest.mark.slow
def test_cells_that_a_probe_chooses_are_planned_and_kept_on_resume(tmp_path):
    """The probed cells are in the plan and the export, and a resumed run does not probe again."""
    dense, output = tiny_checkpoint(tmp_path / "dense"), tmp_path / "out"
    settings = {"photon.window": 16, "photon.memory_budget": 3}
    convert(dense, output, **settings, **{"train.dense_baseline": "false"})
    record = json.loads((output / "stages.json").read_text())["done"]["probe"]
    config = json.loads((output / "export" / "config.json").read_text())
    (cell,) = record["cells"]
    layer, head = cell.split(":")
    assert config["memory_cells"] == {layer: [int(head)]}
    assert CellProbe.from_json((output / "probe.json").read_text()).best_cells(1) == {int(layer): [int(head)]}
    before = (output / "stages.json").read_bytes()
    convert(dense, output, **settings, **{"train.dense_baseline": "false", "resume": "true"})
    assert (output / "stages.json").read_bytes() == before


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_over_a_base_in_4_bits_exports_the_weights_it_began_with(tmp_path):
    """Of the dense baseline too; steps too small to see leave them, where rounding would change them by a tenth."""
    pytest.importorskip("bitsandbytes")
    dense = tiny_checkpoint(tmp_path / "dense", hidden_size=64, intermediate_size=128, head_dim=16)
    small = {"train.learning_rate": 1e-7, "train.new_modules_learning_rate": 1e-7}
    report = convert(dense, tmp_path / "out", **{"photon.window": 16, "train.base_bits": 4, **small})
    weights = load_file(dense / "model.safetensors")
    for name in ("export", "dense-finetuned"):
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        for key, weight in weights.items():
            assert (found[key] - weight).norm() < 1e-4 * weight.norm(), (name, key)
    # The trained model has the rounded base: the report says how far its export is from it.
    assert 1e-5 < report["export_check"]["kl"] < 1
