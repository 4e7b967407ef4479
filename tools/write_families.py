"""Write docs/families.md from the registries: what can be converted, how specials are served, and what cannot be, why.

python tools/write_families.py
"""

from __future__ import annotations

from pathlib import Path

from photon_train.conversion.families import FAMILIES
from photon_train.conversion.unsupported import UNSUPPORTED
from photon_train.models.families_photon import LLAMA_LIKE
from photon_vllm import FAMILIES as SERVED
from photon_vllm import REFUSED, TAKEN_FOR_GRANTED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
_HEAD = """# Dense families

Written by `python tools/write_families.py` from the registries; do not edit.

`--model` takes checkpoints whose `config.json` has one of these values of `model_type`. The converted model is the
family's own class of transformers with its attention replaced: norms, multipliers, MLPs and heads are its code. While
the window holds the text it gives the dense logits, for every family. Local layers of a family stay as they are, and
memory stands in its global ones. All of it holds for training, decoding with a cache, packed documents and the paged
engine; [vLLM](serving.md) and the presets `split` and `paper` take the families that are marked, and refuse the others
by name.

Of hybrids the attention layers alone are converted. Their recurrent layers (short convolutions, gated delta nets) stay
the family's own, their states of constant size lie in the same cache, and estimates count them. `generate()` takes
prompts of several lengths where they are padded on the left, as these families do everywhere; packed documents become
rows of their own in every layer (of the dense baseline that a run compares with, in its attention layers alone: there
transformers' recurrent layers read on). A state cannot take tokens back: assisted decoding, prompt lookup and `crop`
are refused in one line, on vLLM speculation, and so are GGUF files and the paged engine, whose memory has no pool of
states. Without the packages `causal-conv1d` and `flash-linear-attention` transformers computes these layers by its
slower reference code, for which the training memory is estimated.

Families with experts keep these as they are: `--lora.target_modules` puts no adapters on them unless it names
`experts`, checkpoints have the names that the family was published with, and estimates count all parameters and those
that a token goes through.

| `model_type` | models | specials | vLLM | `split`, `paper` |
|---|---|---|---|---|
"""
_REFUSED = """
## Not supported

| `model_type` | models | why | what it would take |
|---|---|---|---|
"""
_NEW = """
## A new family

It takes three entries: in `photon_train/layouts.py` (norms and biases of a layer, which linear maps are one, and what
recurrent layers hold), in `photon_train/models/families_photon.py` (the prefix of its classes in transformers, and how
it rotates heads) and in `photon_train/conversion/families.py` (what this page says of it).
`tests/models/test_every_family.py` then tests it, against the dense model and against loops in float64, where what its
attention does its own way needs a line in `rules`; `tests/support/tiny_dense.py` has the settings that make that count
in a small model.
"""


def page() -> str:
    """The page's text."""
    rows = []
    for name, family in FAMILIES.items():
        marks = ["yes" if (family.layers or name) in taken else "" for taken in (SERVED, LLAMA_LIKE)]
        marks[0] += f"no: {REFUSED[name]}" if name in REFUSED else ""
        if name in TAKEN_FOR_GRANTED:
            keys = "`, `".join(TAKEN_FOR_GRANTED[name])
            marks[0] += f"; other values than the published ones are refused of `{keys}`"
        rows.append(f"| `{name}` | `{family.models}` | {family.specials} | {' | '.join(marks)} |\n")
    refused = [
        f"| `{'`, `'.join(entry.model_types)}` | `{entry.models}` | {entry.reason} | {entry.needs} |\n"
        for entry in UNSUPPORTED
    ]
    return "".join([_HEAD, *rows, _REFUSED, *refused, _NEW])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
