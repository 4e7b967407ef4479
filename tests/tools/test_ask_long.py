"""Questions about a long text that is read once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.converted import converted
from photon_train.config import load_config
from photon_train.errors import PhotonError

ROOT = Path(__file__).resolve().parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("ask_long", ROOT / "tools" / "ask_long.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_facts_stand_at_their_places_between_sentences():
    tool, sentences, values = load_tool(), [f"Sentence {number} ends." for number in range(100)], ["111", "222", "333"]
    text = tool.hide(" ".join(sentences), values)
    facts = [tool.NEEDLE.format(key=key, value=value) for key, value in zip(tool._KEYS, values, strict=True)]
    assert [text.index(fact) / len(text) for fact in facts] == pytest.approx(tool._PLACES, abs=0.05)
    for fact in facts:
        text = text.replace(f"{fact} ", "")
    assert text == " ".join(sentences)


def test_answers_come_from_the_text_s_cache_and_a_short_text_is_refused(tmp_path, monkeypatch, capsys):
    dense = tiny_checkpoint(tmp_path / "dense")
    config = load_config(["--photon.window", "16", "--photon.memory_budget", "4"], prog="", description="")
    generator = torch.Generator().manual_seed(0)
    model = converted(dense, config, [torch.randint(3, 200, (4, 64), generator=generator)])
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model.save_pretrained(tmp_path / "export")
    tokenizer.save_pretrained(tmp_path / "export")
    (tmp_path / "text.txt").write_text("A short sentence. " * 30)
    tool, read = load_tool(), []
    forward = type(model.model).forward

    def counted(self, input_ids=None, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    found = tool.answers(str(tmp_path / "export"), tokenizer, tool.hide("A short sentence. " * 12, ["1", "2", "3"]))
    # The text once; each question alone, and then token by token.
    assert sum(read) < found["tokens"] + 3 * 250 < 3 * found["tokens"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    ids = tokenizer(tool._LEAD + tool.hide("A short sentence. " * 12, ["1", "2", "3"]), return_tensors="pt").input_ids
    asked = tokenizer(tool._QUESTION.format(query=tool._KEYS[2]), return_tensors="pt").input_ids
    given = torch.cat([ids, asked], dim=1)
    out = whole.generate(given, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, given.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == found["written"][2]
    argv = [
        "ask_long.py",
        "--model",
        str(tmp_path / "export"),
        "--text",
        str(tmp_path / "text.txt"),
        "--dense",
        str(dense),
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--tokens", "200"])
    tool.main()
    shown = capsys.readouterr().out
    assert all(key in shown for key in tool._KEYS) and "cache of the text" in shown
    monkeypatch.setattr(sys, "argv", [*argv, "--tokens", "2000"])
    with pytest.raises(PhotonError, match="--text has .* tokens: give a longer one"):
        tool.main()
