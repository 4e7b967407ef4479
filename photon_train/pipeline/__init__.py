"""The stages of a conversion run in their order, as the recipes call them; each meets the next on disk."""

from photon_train.pipeline.run import run_conversion

__all__ = ["run_conversion"]
