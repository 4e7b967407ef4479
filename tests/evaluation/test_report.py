"""The report: what goes in comes out, what is missing is left out."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from photon_train.errors import PhotonError
from photon_train.evaluation.report import Report, machine, print_report, read_report, write_report

FULL = Report(
    model="org/dense",
    data="text.jsonl",
    preset="graft",
    dense_ce=3.0,
    dense_tuned_ce=2.9,
    converted_ce=3.3,
    tuned_ce=3.1,
    held_out_sequences=64,
    parameters=1234567,
    dense_parameters=1000000,
    trainable_parameters=54321,
    dense_kv_per_token=2048.0,
    photon_kv_per_token=32.0,
    photon_kv_constant=65536,
    steps=200,
    tokens=409600,
    seconds={"convert": 1.25, "train": 61.0},
    sample_prompt="Once [bold]upon",
    sample_text="a time | `x`\n``` and more",
    export_check={"dtype": "bfloat16", "parameters": 1234567, "max_logit_difference": 0.01, "kl": 0.002},
    paths={"export": "runs/photon/" + "long/" * 40 + "export"},
    versions={"torch": "2.13.0"},
    machine={"platform": "Linux", "cpu_count": 2, "gpus": ["A", "B"]},
)


def shown(report: Report, width: int = 120) -> str:
    output = io.StringIO()
    print_report(report, Console(file=output, width=width))
    return output.getvalue()


@pytest.mark.parametrize("report", [FULL, Report(), Report(dense_ce=0.0, machine=machine())])
def test_round_trip(tmp_path, report: Report) -> None:
    write_report(report, tmp_path / "new")
    assert read_report(tmp_path / "new") == report
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.json", "report.md"}
    write_report(FULL, tmp_path / "new")
    assert read_report(tmp_path / "new") == FULL


def test_json_holds_what_follows_from_the_numbers(tmp_path) -> None:
    write_report(FULL, tmp_path)
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in values["held_out"]] == ["dense", "dense_tuned", "converted", "tuned"]
    assert values["held_out"][0]["perplexity"] == pytest.approx(20.0855, abs=1e-3)
    assert values["kv_ratio"] == 32 / 2048


def test_every_number_is_on_the_screen_and_in_markdown(tmp_path) -> None:
    write_report(FULL, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in (
        *("3.0000", "2.9000", "3.3000", "3.1000", "20.09", "64 sequences"),
        *("1,234,567", "1,000,000", "54,321", "2.00 KiB", "32 B", "1.56%", "64.00 KiB", "200", "409,600"),
        *("1.2", "61.0", "bfloat16", "0.002", "A, B", "2.13.0", "Once [bold]upon"),
    ):
        assert text in markdown and text in shown(FULL), text
    assert f"| {FULL.paths['export']} |" in markdown
    assert "    a time | `x`\n    ``` and more" in markdown


def test_long_paths_are_not_cut() -> None:
    letters = "".join(character for character in shown(FULL, width=60) if character.isalnum() or character in "/")
    assert FULL.paths["export"] in letters


def test_no_text_breaks_a_table(tmp_path) -> None:
    write_report(Report(paths={"a|b": "c|d\ne"}, dense_ce=1.0), tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert "| a\\|b | c\\|d e |" in lines
    bars = [line.replace("\\|", "").count("|") for line in lines if line.startswith("|")]
    assert bars == [4, 4, 4, 3, 3, 3]


def test_missing_rows_are_left_out(tmp_path) -> None:
    report = Report(dense_ce=3.0, tuned_ce=3.1, photon_kv_per_token=32.0)
    write_report(report, tmp_path)
    text = shown(report) + (tmp_path / "report.md").read_text(encoding="utf-8")
    for absent in ("None", "right after", "the same way", "of the dense model's", "Seconds", "Prompt", "Where"):
        assert absent not in text, absent
    assert "32 B" in text


def test_a_dense_model_whose_cache_does_not_grow_has_no_ratio() -> None:
    assert Report(dense_kv_per_token=0.0, photon_kv_per_token=0.0).kv_ratio is None


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_report_that_cannot_be_read(tmp_path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(PhotonError, match="report.json"):
        read_report(tmp_path)
