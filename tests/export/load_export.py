"""Loads an export in a process of its own: `load_export.py DIRECTORY FILE installed|alone`.

Compares with the tokens and logits in FILE, and generates.
"""

from __future__ import annotations

import importlib
import sys

directory, reference, mode = sys.argv[1:]
if mode == "alone":
    # An import of a name that is None here fails as if the package were not installed.
    sys.modules["photon_train"] = sys.modules["photon_kernels"] = None
    for name in ("photon_train", "photon_kernels"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        sys.exit(f"{name} can be imported: the test is void")
else:
    importlib.import_module("photon_train.models")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

options = {"trust_remote_code": True} if mode == "alone" else {}
expected = load_file(reference)
model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
home = "transformers_modules." if mode == "alone" else "photon_train.models."
assert type(model).__module__.startswith(home), type(model)
difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
assert difference <= 2e-4, difference
tokenizer = AutoTokenizer.from_pretrained(directory, **options)
text = tokenizer(["t05 t06 t07 t08 t09", "t11 t12"], return_tensors="pt", padding=True, padding_side="left")
generated = model.generate(**text, max_new_tokens=9, do_sample=False, eos_token_id=None)
assert generated.tolist() == expected["generated"].tolist(), generated
