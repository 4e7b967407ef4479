"""Other projects' suites and trainers on our models; `make test-peers` fetches them and puts them on the path."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
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


# A window that short texts exceed, and little training.
CONVERSION = {
    "--photon.window": 16,
    "--train.seq_len": 64,
    "--train.batch_size": 4,
    "--train.max_steps": 2,
    "--train.eval_sequences": 4,
    "--train.mixed_precision": "no",
    "--lora.rank": 4,
    "--tracking.tracker": "none",
}


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the main command exports of a tiny Llama."""
    from tiny_checkpoint import tiny_checkpoint

    directory = tmp_path_factory.mktemp("conversion")
    dense = tiny_checkpoint(directory / "dense", bos_token_id=None, eos_token_id=256)  # the end of a text
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"Line {line} of a text says {line * line % 7}." for line in range(600)))
    given = {"--model": dense, "--data": text, "--output": directory / "output", **CONVERSION}
    command = [
        sys.executable,
        "-m",
        "photon_train.commands.convert",
        *(str(part) for pair in given.items() for part in pair),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "output" / "export"
