"""The README and the guides: commands that parse, links that lead somewhere, numbers that were measured.

Every number of a page has an entry in `quoted_numbers.yaml`; a sentence or table that changes needs its entry changed.
A claim is a piece of the page with an expression over the records in braces where a number stands; claims are separated
by an empty line, line breaks do not matter: ``recovers {100 * latent.where(name='latent').mean('recovered')}% of``.
A value must agree with the printed digits (``{> ...}``: be below the printed number; also ``<``, ``>=``, ``<=``).
A table has one expression per column over `rows`, which its first cells select (`name`, `cells`); two numbers: ``;``.
Settings, targets and the like stand under `not_measured`, by reason, with the words around them; commands, inline code,
versions and names (`fp32`, `ZeRO-3`) need nothing. A number that no record supports is not printed.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from quoted_numbers import check, load_records

from photon_train.commands.convert import read_settings
from photon_train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REGISTRY = ROOT / "tests" / "quoted_numbers.yaml"
# They read a RunConfig.
CONFIGURED = {"convert.py", "convert_llama.py", "convert_qwen.py", "finetune.py", "pretokenize.py"}


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of every command in a block of shell code; continued lines are joined, comments dropped."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append((page.name, words))
    return found


def scripts() -> list[tuple[str, str, list[str]]]:
    """Page, script and arguments of the commands that run a file of this repository, or what it installs."""
    found = []
    for page, words in commands():
        if words[0] == "photon-train":
            found.append((page, f"photon_train/commands/{words[1].replace('-', '_')}.py", words[2:]))
            continue
        for index, word in enumerate(words):
            if re.match(r"(recipes|tools)/\w+\.(py|sh)$", word):
                found.append((page, word, words[index + 1 :]))
            elif word.startswith("photon_train.commands."):
                found.append((page, f"{word.replace('.', '/')}.py", words[index + 1 :]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_main_commands_are_found():
    found = {script for _, script, _ in scripts()}
    assert {
        "recipes/convert_llama.py",
        "photon_train/commands/convert.py",
        "photon_train/commands/generate.py",
    } <= found


@pytest.mark.parametrize(("page", "script", "arguments"), scripts())
def test_commands_name_files_and_settings_that_exist(page, script, arguments):
    path = ROOT / script
    assert path.is_file()
    if path.name in CONFIGURED:
        load_config(arguments, prog=path.name, description="")
    elif path.parent.name in ("recipes", "commands"):
        importlib.import_module(f"photon_train.commands.{path.stem}").make_parser().parse_args(arguments)
    elif path.suffix == ".py":
        known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
        used = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert used <= known, f"{page}: {script} has no {used - known}"


def test_accelerate_configs_and_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page, words in commands():
        if words[0] == "make":
            assert words[1] in targets, page
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file(), page


def test_every_number_is_what_its_record_says():
    registry = yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))
    records = load_records(registry["records"], registry["definitions"])
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
    problems = [f"{page} is not a page" for page in registry["pages"].keys() - texts.keys()]
    for page, text in texts.items():
        entries = registry["pages"].get(page, {})
        problems += [f"{page}, {problem}" for problem in check(text, entries, registry["rules"], records)]
    assert not problems, "\n".join(["numbers and tests/quoted_numbers.yaml disagree:", *problems])


def test_every_name_and_rule_of_the_registry_is_used():
    text = REGISTRY.read_text(encoding="utf-8")
    registry = yaml.safe_load(text)
    for name in (*registry["records"], *registry["definitions"]):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is used by nothing"
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for reason, pattern in registry["rules"].items():
        assert re.search(pattern, pages), f"the rule {reason!r} matches nothing"


def test_the_settings_of_the_demo_are_what_the_command_reads():
    """Without a model the command takes the demo's YAML, with one the defaults."""
    demo, plain = read_settings([]), read_settings(["--model", "somewhere"])
    assert demo.train.max_steps < plain.train.max_steps
