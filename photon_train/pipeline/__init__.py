"""The stages of a run in their order, as the recipes call them; each meets the next on disk."""

from photon_train.pipeline.finetune import run_finetuning
from photon_train.pipeline.run import run_conversion

__all__ = ["run_conversion", "run_finetuning"]
