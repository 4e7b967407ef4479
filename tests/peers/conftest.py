"""Other projects' suites and trainers on our models; `make test-peers` fetches them and puts them on the path."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path

import pytest

# Where transformers copies the code of exports; it is read when transformers is imported.
MODULES = tempfile.TemporaryDirectory(prefix="photon-peers-")
os.environ["HF_MODULES_CACHE"] = MODULES.name

for name in ("transformers_tests", "trl"):
    if importlib.util.find_spec(name) is None:
        pytest.exit(f"tests/peers needs {name}: run `make test-peers`", returncode=2)

import transformers_tests  # noqa: E402

# What the source distribution lacks is taken from a checkout, where there is one.
if checkout := os.environ.get("TRANSFORMERS"):
    transformers_tests.__path__.append(str(Path(checkout, "tests")))


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers of transformers' tests: ours are strict."""
    helpers = Path(importlib.util.find_spec("transformers").origin).with_name("testing_utils.py")
    suites = [path for root in transformers_tests.__path__ for path in Path(root).glob("**/test_*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in (helpers, *suites))
    for marker in sorted(set(re.findall(r"\bmark\.(\w+)", text)) - {"parametrize", "skip", "skipif", "xfail"}):
        config.addinivalue_line("markers", f"{marker}: of transformers")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny Llama's conversion, with a window and a unit that short texts exceed."""
    from tiny_checkpoint import tiny_checkpoint
    from transformers import AutoTokenizer

    from photon_train.cli import load_config
    from photon_train.config import ExportSettings
    from photon_train.conversion.apply import convert
    from photon_train.conversion.plan import make_plan
    from photon_train.conversion.presets import layer_map, photon_config
    from photon_train.conversion.source import DenseCheckpoint
    from photon_train.export.save import export_model
    from photon_train.models import PhotonForCausalLM

    directory = tmp_path_factory.mktemp("export")
    dense = tiny_checkpoint(
        directory / "dense", bos_token_id=None, eos_token_id=256
    )  # the end of a text to its tokenizer
    settings = load_config(["--photon.window", "16"], prog="", description="")
    checkpoint = DenseCheckpoint.open(str(dense))
    target = photon_config(checkpoint.config, settings)
    plan = make_plan(checkpoint, target, layer_map(checkpoint.config, settings), seed=0)
    convert(checkpoint, plan, target, directory / "converted", progress=False)
    model = PhotonForCausalLM.from_pretrained(directory / "converted")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    return export_model(model, tokenizer, directory / "exported", settings=ExportSettings(), card="")
