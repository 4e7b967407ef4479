"""An export in fresh processes: with photon-train, and without it through `trust_remote_code`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import photon_model, tokens
from tiny_dense import SPECIALS

from photon_train.config import ExportSettings
from photon_train.export.save import export_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "lfm2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> tuple[Path, Path]:
    """An export, and the tokens, logits and generated text of its model."""
    folder = tmp_path_factory.mktemp("exported")
    # Two levels of memory, sinks and branches: most of the shipped code runs.
    # The others of LFM2 are convolutions.
    changes = {"num_hidden_layers": 4, "memory_cells": {1: [0, 1]}} if request.param == "lfm2" else {}
    model = photon_model("memory-apart", request.param, **SPECIALS.get(request.param, {}), **changes)
    directory = export_model(model, tokenizer, folder / "my-model.v1", settings=ExportSettings(), card="")
    ids = tokens(2, 31)
    padded = torch.tensor([[5, 6, 7, 8, 9], [2, 2, 2, 11, 12]])
    with torch.no_grad():
        reference = {"tokens": ids, "logits": model(ids).logits}
        reference["generated"] = model.generate(
            padded, attention_mask=padded.ne(2).long(), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
    save_file(reference, folder / "reference.safetensors")
    return directory, folder / "reference.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["installed", "alone"])
def test_loads_in_a_fresh_process(tmp_path: Path, exported: tuple[Path, Path], mode: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    if mode == "installed":
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    script = Path(__file__).with_name("load_export.py")
    command = [sys.executable, str(script), *map(str, exported), mode]
    settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **settings)
    assert done.returncode == 0, done.stderr
    assert "custom code?" not in done.stdout + done.stderr  # nobody is asked


@pytest.mark.parametrize("page", ["README.md", "photon_train/export/card.py"])
def test_what_is_written_of_loading_asks_nobody(page: str) -> None:
    """Even a tokenizer is looked up through config.json, which names code of ours."""
    text = (ROOT / page).read_text(encoding="utf-8").partition("import photon_train")[0]
    calls = re.findall(r"from_pretrained\((.+)\)", text)
    assert len(calls) >= 2 and all("trust_remote_code=True" in call for call in calls), calls
