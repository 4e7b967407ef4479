"""transformers' common tests of a model, on `graft` as on the families of transformers.

The tests are read from transformers' source distribution. Its generation tests are in a checkout only (see the
Makefile); what `generate()` does is tested against the dense family in `test_generation.py` as well.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
import types
import unittest
from collections.abc import Callable
from fnmatch import fnmatch

import pytest
import torch
from tiny import photon_config
from transformers.models.auto import modeling_auto

from photon_train.models import PhotonForCausalLM, PhotonModel


def _stand_in(name: str, *mixins: str) -> None:
    """Let the suites import mixins that have no tests here."""
    package = name.rpartition(".")[0]
    sys.modules[name] = types.ModuleType(name)
    sys.modules.setdefault(package, types.ModuleType(package))
    for mixin in mixins:
        setattr(sys.modules[name], mixin, type(mixin, (), {}))


HAS_GENERATION = importlib.util.find_spec("transformers_tests.generation") is not None
if not HAS_GENERATION:
    _stand_in("transformers_tests.generation.test_utils", "GenerationTesterMixin")
# Graphs of torch.export, ONNX and OpenVINO: they hold the caches that transformers itself defines. One suite imports
# this module by its place in the checkout.
for package in ("transformers_tests", "tests"):
    _stand_in(f"{package}.exporters.test_export", "ExportTesterMixin", "ExportGenerateTesterMixin")
# The tests look a class up by its name to know what it computes.
modeling_auto.MODEL_MAPPING_NAMES["photon"] = PhotonModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["photon"] = PhotonForCausalLM.__name__

from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# Test (a pattern of `fnmatch`) -> what its failure says, and why it does not apply. A test of this list that passes, or
# fails in another way, fails the run.
NOT_APPLICABLE: dict[str, tuple[str, str]] = {}
NEEDS_CHECKOUT = "transformers' generation tests are in no source distribution: make test-peers TRANSFORMERS=<checkout>"


class Tester:
    """What the common tests ask a family for: a small configuration and inputs."""

    batch_size, seq_length = 3, 12  # a batch that no other size equals
    is_training = True
    base_model_class, causal_lm_class = PhotonModel, PhotonForCausalLM

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        config = self.get_config()
        self.num_hidden_layers, self.hidden_size = config.base_config["num_hidden_layers"], config.base_config["hidden_size"]
        self.num_attention_heads = config.base_config["num_attention_heads"]

    def get_config(self):
        # Most tokens are beyond the window: the memory takes part in whatever is compared.
        return photon_config("memory-latent", self.model_type)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        return config, {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def expect_failure(test: Callable, error: str, reason: str) -> Callable:
    """`test`, which must fail with a message that matches `error`."""

    @functools.wraps(test)
    def run(self: unittest.TestCase) -> None:
        self.subTest = lambda *args, **kwargs: contextlib.nullcontext()  # it would keep the failure to itself
        try:
            test(self)
        except unittest.SkipTest as skip:
            raise AssertionError(f"skips itself ({skip}): take it off the list") from skip
        except Exception as found:
            if not re.search(error, f"{type(found).__name__}: {found}"):
                raise
            pytest.xfail(reason)
        self.fail("passes: take it off the list")

    return run


def suite(name: str, model_type: str) -> type[unittest.TestCase]:
    """The tests of one dense family; one of them, by name, never appears twice."""

    def set_up(self) -> None:
        self.model_tester = Tester(model_type)

    bases = (ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase)
    found = type(name, bases, {"setUp": set_up, "model_tester": None, "all_model_classes": (PhotonModel, PhotonForCausalLM)})
    tests = [test for test in dir(found) if test.startswith("test_")]
    for pattern, (error, reason) in NOT_APPLICABLE.items():
        names = [test for test in tests if fnmatch(test, pattern)]
        assert names, f"no test {pattern}"
        for test in names:
            setattr(found, test, expect_failure(getattr(found, test), error, reason))
    return found


LlamaTest = suite("LlamaTest", "llama")


@pytest.mark.skipif(not HAS_GENERATION, reason=NEEDS_CHECKOUT)
def test_generation() -> None:
    """Counts as skipped where the generation tests are not there."""
    assert issubclass(LlamaTest, GenerationTesterMixin) and hasattr(LlamaTest, "test_greedy_generate")
