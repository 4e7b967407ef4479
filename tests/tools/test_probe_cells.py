"""Kept cells on models whose answer is known, and the command from a checkpoint to a table and a plot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_probe import HEADS, LAYERS, SINKS, WINDOW, own_text, quieten, sharp_dense
from tiny_tokenizer import word_tokenizer

from lib.kept_cells import Restriction, best_layers, plot_cells
from photon_train.conversion.cells import CellProbe, ProbedLoss, probe_cells

ROOT = Path(__file__).resolve().parents[2]
ALL = {layer: list(range(HEADS)) for layer in range(LAYERS)}


def restriction(model, **changes) -> Restriction:
    texts = [own_text(model), own_text(model, count=2, length=30, name="more")]
    return Restriction(model, texts, WINDOW, SINKS, list(range(LAYERS)), **changes)


def test_kept_cells_win_back_what_they_carry() -> None:
    model = sharp_dense()
    quieten(model, loud=(1, 0))
    found = restriction(model)
    assert found.recovered({}) == pytest.approx({"text": 0, "more": 0}, abs=1e-6)
    assert found.recovered(ALL) == pytest.approx({"text": 1, "more": 1}, abs=1e-3)
    assert found.recovered({1: [0]}) == pytest.approx({"text": 1, "more": 1}, abs=0.1)
    without = {**ALL, 1: [1]}
    assert found.recovered(without) == pytest.approx({"text": 0, "more": 0}, abs=0.1)
    alone = found.losses(without, layers=(1,))
    assert alone == pytest.approx(found.losses(without), abs=1e-6)


def test_ends_are_those_of_the_probe() -> None:
    model = sharp_dense()
    found = restriction(model)
    probe = probe_cells(model, found.texts, WINDOW, SINKS)
    assert found.dense == pytest.approx({name: loss.dense for name, loss in probe.losses.items()}, abs=1e-6)
    assert found.restricted == pytest.approx({name: loss.restricted for name, loss in probe.losses.items()}, abs=1e-6)


@pytest.mark.parametrize("loud", [(0, 1), (2, 0)])
def test_leaving_one_out_finds_what_is_missed(loud: tuple[int, int]) -> None:
    model = sharp_dense()
    quieten(model, loud)
    found, cells = restriction(model), []
    ranking = found.leave_one_out(lambda: cells.append(1))
    assert len(cells) == LAYERS * HEADS
    assert ranking.best_cells(1) == {loud[0]: [loud[1]]}
    assert ranking.scores[loud[0]][loud[1]] == pytest.approx(1, abs=0.1)
    layer, head = loud
    without = found.losses({**ALL, layer: [1 - head]})["text"]
    assert ranking.losses["text"].gradients[layer][head] == pytest.approx(found.dense["text"] - without, abs=1e-6)
    left_alone = Restriction(model, found.texts, WINDOW, SINKS, [1]).leave_one_out(lambda: None)
    assert not any(left_alone.losses["text"].gradients[0]) and all(left_alone.losses["text"].gradients[1])


def test_layers_are_ranked_by_their_cells_together(tmp_path: Path) -> None:
    gradients = [[-0.1, -0.2], [-0.5, 0.4], [0.0, -0.2]]
    probe = CellProbe(64, 4, {"text": ProbedLoss(3.0, 4.0, 0.1, gradients)})
    assert best_layers(probe, 1) == {0: [0, 1]} and best_layers(probe, 2) == {0: [0, 1], 2: [0, 1]}
    plot_cells(probe, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("compare", [False, True])
def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path: Path, compare: bool) -> None:
    model, output = sharp_dense(), tmp_path / "probe.json"
    model.save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    # Documents fill sequences exactly, with the token that ends them.
    (tmp_path / "text").mkdir()
    for number, ids in enumerate(own_text(model, count=60, length=47).tokens):
        (tmp_path / "text" / f"{number}.txt").write_text(word_tokenizer().decode(ids))
    arguments = ["--model", tmp_path / "dense", "--data", tmp_path / "text", "--window", 2, "--output", output]
    arguments += ["--seq-len", 48, "--sequences", 12, 6, 4, *(["--compare", 1, 6] if compare else [])]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tools" / "probe_cells.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "wins back" in done.stdout and output.with_suffix(".png").is_file()
    record = json.loads(output.read_text())
    assert record["model"] == "dense" and record["window"] == 2 and {"machine", "versions", "commit"} <= record.keys()
    if not compare:
        assert {(row["layer"], row["head"]) for row in record["rows"]} == {(i, j) for i in ALL for j in ALL[i]}
        scores = torch.tensor([row["score"] for row in record["rows"]])
        assert record["seconds"] > 0 and torch.equal(scores, scores.sort(descending=True).values)
        return
    assert set(record["rankings"]) == {"gradient at 0.5", "gradient at 1", "leaving one out"}
    whole = [row for row in record["rows"] if row["cells"] == 6]
    assert len(whole) == 5 and all(row["growing_percent"] == 100 for row in whole)
    assert all(row["text"] == pytest.approx(1, abs=1e-3) for row in whole)
