"""The model card is read by the hub and by people."""

from __future__ import annotations

import pytest
import yaml

from photon_train.evaluation.report import Report
from photon_train.export.card import model_card


def front_matter(card: str) -> dict:
    head, text = card.removeprefix("---\n").split("---\n", 1)
    assert text.strip()
    return yaml.safe_load(head)


def test_holds_the_numbers_of_the_run() -> None:
    report = Report(
        model="meta-llama/Llama-3.2-1B",
        preset="graft",
        data="books",
        dense_ce=3.25,
        tuned_ce=3.5,
        dense_kv_per_token=32768,
        photon_kv_per_token=512,
        photon_kv_constant=2**20,
    )
    card = model_card(report.to_dict())
    front = front_matter(card)
    assert front["library_name"] == "transformers" and front["base_model"] == "meta-llama/Llama-3.2-1B"
    assert "photon" in front["tags"]
    assert "| Dense model | 3.2500 | 25.79 |" in card and "| PHOTON, fine-tuned | 3.5000 | 33.12 |" in card
    assert "right after conversion" not in card
    for text in ("512 B (1.6%)", "32.00 KiB", "1.00 MiB", "a sliding window", "books", "trust_remote_code=True"):
        assert text in card, text


@pytest.mark.parametrize(
    ("preset", "said", "unsupported"),
    [
        ("graft", "some of them a memory", "continuous batching is not"),
        ("split", "summarised bottom-up", "assisted decoding and continuous batching are not"),
        ("paper", "a token's own chunk", "assisted decoding and continuous batching are not"),
    ],
)
def test_says_what_the_preset_does(preset, said, unsupported) -> None:
    card = model_card({"preset": preset})
    assert said in card and unsupported in card and f"preset:{preset}" in front_matter(card)["tags"]


def test_a_directory_is_no_base_model(tmp_path, monkeypatch) -> None:
    """Be it called like one of the hub's."""
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in (str(tmp_path), "./local/model", "owner/model", None):
        assert "base_model" not in front_matter(model_card({"model": model}))


def test_without_numbers() -> None:
    card = model_card({})
    assert "None" not in card and "## Held-out" not in card and "## Key-value" not in card
