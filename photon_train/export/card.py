"""The model card: README.md of an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from photon_train.accounting import format_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(report: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter, as the hub reads it.

    Args:
        report: ``photon_train.evaluation.report.Report.to_dict()``, or what of it is known at export; what is missing
            is left out. ``model`` becomes the card's ``base_model`` if it is a hub id.
    """
    model, preset = report.get("model"), report.get("preset")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["photon", "photon-train", "long-context", *([f"preset:{preset}"] if preset else [])],
    }
    if model and _HUB_ID.fullmatch(model) and not Path(model).exists():
        front["base_model"] = model
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# PHOTON model made from {Path(model).name if model else 'a dense language model'}",
        " ".join(part for part in (_WHAT.get(preset), _MADE) if part),
        _quality(report),
        _cache(report),
        _LOADING,
        _limits(preset),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_PAPER = "[arXiv 2512.20687](https://arxiv.org/abs/2512.20687)"
_HIERARCHY = f"""\
A causal language model with a hierarchy (PHOTON, {_PAPER}): chunks of tokens are summarised bottom-up, and decoders
with a bounded attention write the tokens. Most of its key-value cache does not grow with the context."""
# By preset.
_WHAT = {
    "graft": f"""\
The dense model with its attention replaced (PHOTON, {_PAPER}): its layers see a sliding window and the first tokens,
and some of them a memory, in which each unit of tokens outside the window is packed into one latent. Most of its
key-value cache does not grow with the context.""",
    "split": _HIERARCHY,
    "paper": _HIERARCHY,
}
_MADE = "It was converted from a dense model by photon-train and fine-tuned; adapters are merged."

_LOADING = """\
## Loading

With transformers alone; this runs the Python files of this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

With photon-train installed no code is read from this folder, and on an NVIDIA GPU the Triton kernels can be used:

```python
import photon_train.models  # registers the model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto").to("cuda")
model.set_backend("triton")
```"""

# What of a text is not seen as it is, by preset.
_SEEN = {
    "graft": "What lies outside the window is seen through a compressed memory, and by its attention heads alone",
    "split": "What lies outside the token decoder's window is seen through summaries",
    "paper": "What lies outside a token's own chunk is seen through summaries",
}


def _limits(preset: str | None) -> str:
    seen = _SEEN.get(preset, "Distant text is seen in compressed form")
    unsupported = "continuous batching is" if preset == "graft" else "assisted decoding and continuous batching are"
    return f"""\
## Limits

- {seen}: exact recall of distant text can be worse than the dense model's. Measure it on your task.
- The dense model's limits, biases and licence apply.
- Of transformers, `generate()` is supported; {unsupported} not.
- `manifest.json` lists the sha256 of every file, the settings and the versions of the run."""


def _quality(report: Mapping[str, Any]) -> str:
    rows = report.get("held_out") or []
    if not rows:
        return ""
    data = f" ({report['data']})" if report.get("data") else ""
    lines = [
        f"## Held-out text{data}",
        "",
        "| model | cross-entropy (nats per token) | perplexity |",
        "|---|---:|---:|",
        *(f"| {row['label']} | {row['cross_entropy']:.4f} | {row['perplexity']:.2f} |" for row in rows),
    ]
    return "\n".join(lines)


def _cache(report: Mapping[str, Any]) -> str:
    dense, photon = report.get("dense_kv_per_token"), report.get("photon_kv_per_token")
    if dense is None or photon is None:
        return ""
    ratio = f" ({photon / dense:.1%})" if dense else ""
    text = (
        f"## Key-value cache\n\nEach token adds {format_bytes(photon)}{ratio} to the cache; the dense model's grows by "
        f"{format_bytes(dense)}."
    )
    constant = report.get("photon_kv_constant")
    return text if constant is None else f"{text} Beside that a sequence holds a constant {format_bytes(constant)}."
