"""The environment report: what is installed beside what is tested."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("environment_tool", ROOT / "tools" / "environment.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_the_report_names_installed_and_tested_versions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["environment.py", "--json"])
    tool.main()
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"]["installed"] == torch.__version__
    assert found["packages"]["transformers"]["tested"].startswith("==")
    assert found["cpu_count"] and found["triton_backend"]


def test_no_key_and_no_secret_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "argv", ["environment.py"])
    tool.main()
    assert "logged offline" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", "secret" * 8)
    tool.main()
    shown = capsys.readouterr().out
    assert "key found" in shown and "secret" not in shown


def test_constraints_are_read_with_markers_and_ranges():
    text = "# a comment\npeft==0.21.2\nscikit-learn==1.9; python_version >= '3.11'\ntriton>=3.6,<=3.9.0\n"
    assert tool.tested_versions(text) == {"peft": "==0.21.2", "scikit_learn": "==1.9", "triton": ">=3.6,<=3.9.0"}
