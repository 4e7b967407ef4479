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
from tiny import base_config
from transformers.models.auto import modeling_auto

from photon_train.models import PhotonConfig, PhotonForCausalLM, PhotonModel


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

NEEDS_CHECKOUT = "transformers' generation tests are in no source distribution: make test-peers TRANSFORMERS=<checkout>"
# Test (a pattern of `fnmatch`) -> what its failure says, and why it does not apply. A test of this list that passes, or
# fails in another way, fails the run.
NO_EAGER = ("leave attn_implementation='eager' out", "asks for transformers' eager attention, which PHOTON replaces")
NO_WEIGHTS = ("leave output_attentions out", "asks for attention weights, which PHOTON never holds and refuses to give")
GAPS = (
    "position_ids must count",
    "prompts with padding after them: without a cache, generate() counts the padding, which PHOTON refuses to follow",
)
INDIRECT = (
    "False is not true",
    "looks among the direct bases of a family's class, which has GenerationMixin by PhotonForCausalLM",
)
NO_LAYERS = ("list index out of range", "compares caches by their layers; test_generation.py compares what follows")
EXPERTS = (
    "No key mapping was performed",
    "names of experts are registered for the one model type that all families share: these have none",
)
NOT_APPLICABLE = {
    "test_reverse_loading_mapping": EXPERTS,
    "test_can_set_attention_dynamically": NO_EAGER,
    "test_retain_grad_hidden_states_attentions": NO_EAGER,
    "test_capture_outputs_decorator": NO_WEIGHTS,
}
NOT_APPLICABLE_TO_GENERATION = {
    "test_assisted_decoding_*": NO_EAGER,
    "test_beam_sample_generate_dict_output": GAPS,
    "test_beam_search_generate_dict_output": GAPS,
    "test_greedy_generate_dict_outputs": GAPS,
    "test_sample_generate_dict_output": GAPS,
    "test_inherits_generation_mixin": INDIRECT,
    "test_generate_continue_from_inputs_embeds": NO_LAYERS,
    "test_generate_continue_from_past_key_values": NO_LAYERS,
}


class Family:
    """What the common tests ask about a model: its classes, a small configuration, and inputs."""

    batch_size, seq_length = 3, 12
    is_training = True

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        config = self.get_config()
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        # The classes of an instance: those with the family's signatures, which the tests read.
        with torch.device("meta"):
            self.base_model_class, self.causal_lm_class = (
                type(made(config)) for made in (PhotonModel, PhotonForCausalLM)
            )

    def get_config(self) -> PhotonConfig:
        """Most tokens are beyond the window: the memory takes part in whatever is compared."""
        settings = base_config(self.model_type, num_hidden_layers=2)
        photon = {"window": 4, "num_sinks": 1, "chunk_size": 2, "memory_cells": {1: [1]}}
        return PhotonConfig(base_model_type=settings.pop("model_type"), **photon, **settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PhotonConfig, dict[str, torch.Tensor]]:
        """Row r has r + 1 tokens, and padding."""
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


def suite(model_type: str) -> type[unittest.TestCase]:
    """The tests of one dense family."""
    family = Family(model_type)
    members = {
        "__module__": __name__,
        "model_tester": family,
        "all_model_classes": (family.base_model_class, family.causal_lm_class),
        "has_attentions": False,
    }
    bases = (ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase)
    found = type(f"{model_type.capitalize()}Test", bases, members)
    # `parameterized` leaves None behind where it has expanded a test.
    tests = [name for name in dir(found) if name.startswith("test_") and callable(getattr(found, name))]
    for pattern, failure in (NOT_APPLICABLE | (NOT_APPLICABLE_TO_GENERATION if HAS_GENERATION else {})).items():
        names = [name for name in tests if fnmatch(name, pattern)]
        assert names, f"transformers has no test {pattern} any more: take it off the list"
        for name in names:
            setattr(found, name, expect_failure(getattr(found, name), *failure))
    return found


LlamaTest, MistralTest, Qwen2Test, Qwen3Test = map(suite, ("llama", "mistral", "qwen2", "qwen3"))


@pytest.mark.skipif(not HAS_GENERATION, reason=NEEDS_CHECKOUT)
def test_the_generation_tests_are_there() -> None:
    """Skipped, visibly, where they are not."""
    assert hasattr(LlamaTest, "test_greedy_generate")
