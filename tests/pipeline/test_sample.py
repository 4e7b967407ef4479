"""The sample of a finished run."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny import photon_model
from tiny_tokenizer import word_tokenizer

from photon_train.config import ExportSettings, RunConfig
from photon_train.pipeline import base


def test_a_sample_shows_the_model_and_not_its_generation_config(tmp_path, monkeypatch):
    model, used = photon_model("memory"), []
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 9.0, 3
    monkeypatch.setattr(base, "load_for_inference", lambda *_, **__: (model, word_tokenizer()))
    generate = type(model).generate

    def watched(self, *args, **kwargs):
        used.append(self.generation_config)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", watched)
    config = RunConfig(export=ExportSettings(sample_prompt="t05 t06", sample_tokens=3))
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    run = base.TrainingRun(config, accelerator, None)
    run.exported = tmp_path
    assert run._write_sample(None)["prompt"] == "t05 t06"
    assert used[0].repetition_penalty in (None, 1.0) and used[0].num_beams in (None, 1)
    assert used[0].eos_token_id == model.config.eos_token_id
