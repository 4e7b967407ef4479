"""Long evaluation: losses are the full forward's, prompts are RULER's and fit, batches answer as prompts alone do."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint
from tiny_gguf import gguf_model, write_gguf
from tiny_prose import prose
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from photon_train.commands.evaluate import main
from photon_train.config import load_config
from photon_train.conversion.apply import convert
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.corpora import Document
from photon_train.errors import PhotonError
from photon_train.evaluation import positions
from photon_train.evaluation.long import LongSettings, estimate_seconds, evaluate_long, prepare_long, retrieval_columns
from photon_train.evaluation.positions import bucket_means, long_rows, position_losses
from photon_train.evaluation.retrieval import Answer, answer_samples
from photon_train.evaluation.ruler import TASKS, Haystack, Sample, make_samples, score

LENGTH = 2048  # bytes: the tokenizer has no longer tokens


DOCUMENTS = [Document(f"{seed}.txt", prose(seed, 120)) for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dense model, and its graft with a window of 16 tokens and a memory."""
    directory = tmp_path_factory.mktemp("long")
    dense = tiny_checkpoint(directory / "dense")
    config = load_config(["--photon.window", "16", "--photon.num_sinks", "2"], prog="", description="")
    checkpoint = DenseCheckpoint.open(str(dense))
    target = photon_config(checkpoint.config, config)
    convert(checkpoint, make_plan(checkpoint, target), target, directory / "photon", progress=False)
    AutoTokenizer.from_pretrained(dense).save_pretrained(directory / "photon")
    return {"dense": dense, "photon": directory / "photon"}


@pytest.fixture(params=["dense", "photon"])
def model(request, checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints[request.param]).eval()


@torch.no_grad()
def test_losses_by_position_are_those_of_one_forward(model, monkeypatch):
    row = torch.arange(500) * 7 % 257
    whole = F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
    counts = []
    monkeypatch.setattr(positions, "_LOGITS", 257 * 64)  # segments of 64 tokens
    losses = position_losses(model, row, on_tokens=counts.append)
    torch.testing.assert_close(losses, whole, rtol=0, atol=2e-4)
    assert counts == [64] * 7 + [52]
    # A segment that ends one token before the text does leaves that token to predict, and none after it.
    torch.testing.assert_close(position_losses(model, row[:65]), whole[:64], rtol=0, atol=2e-4)


def test_buckets_begin_where_they_say():
    losses = torch.arange(1.0, 2048.0)[None] + torch.tensor([[0.0], [2.0]])  # token i costs i, and i + 2
    found = bucket_means(losses, beyond=256)
    assert found["ce"] == pytest.approx(1 + 1024)
    assert found["ce_beyond_window"] == pytest.approx(1 + (256 + 2047) / 2)
    assert found["ce_by_position"] == pytest.approx(
        {"0-256": 1 + 128, "256-1024": 1 + (256 + 1023) / 2, "1024-2048": 1 + (1024 + 2047) / 2}
    )
    assert bucket_means(losses[:, :100], beyond=256)["ce_beyond_window"] is None
    assert list(bucket_means(torch.ones(1, 40000), 256)["ce_by_position"])[-2:] == ["16384-32768", "32768-"]


def test_pieces_of_documents_take_turns_and_never_overlap():
    tokenizer = byte_tokenizer()
    documents = [Document("a", "a" * 25), Document("b", "b" * 9), Document("c", "c" * 15 + "d" * 15)]
    rows = long_rows(documents, tokenizer, 10, 4)
    assert tokenizer.batch_decode(rows) == ["a" * 10, "c" * 10, "a" * 10, "c" * 5 + "d" * 5]
    assert len(long_rows(documents, tokenizer, 10, 9)) == 5
    with pytest.raises(PhotonError, match="none of 3 documents has 31 tokens"):
        long_rows(documents, tokenizer, 31, 4)


def test_pieces_begin_as_the_tokenizer_begins_texts():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|end|>"
    single, special = f"{tokenizer.bos_token} $A", [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    rows = long_rows([Document("a", "abcdefghij" * 3)], tokenizer, 11, 3)
    assert tokenizer.batch_decode(rows) == ["<|end|>abcdefghij"] * 3


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_fits_and_hold_their_answers(task):
    tokenizer, haystack = byte_tokenizer(), Haystack(DOCUMENTS)
    samples = make_samples(task, haystack, tokenizer, LENGTH, 5)
    for sample in samples:
        text = tokenizer.decode(sample.tokens)
        used = len(sample.tokens) + sample.max_new_tokens
        assert LENGTH - 120 <= used <= LENGTH  # a sentence more would not fit
        assert sample.max_new_tokens > len(", ".join(sample.answers))
        assert all(answer in text for answer in sample.answers)
        assert tokenizer.decode(sample.answer_tokens).strip() == sample.answers[0]
    assert len({tuple(sample.tokens) for sample in samples}) == 5
    assert make_samples(task, Haystack(DOCUMENTS), tokenizer, LENGTH, 2) == samples[:2]
    assert make_samples(task, haystack, tokenizer, LENGTH, 1, seed=1) != samples[:1]
    with pytest.raises(PhotonError, match=f"no prompt of {task} fits 100 tokens"):
        make_samples(task, haystack, tokenizer, 100, 1)


def test_a_single_needle_lies_at_its_depth_and_is_asked_for_in_rulers_words():
    tokenizer = byte_tokenizer()
    for sample in make_samples("niah_single", Haystack(DOCUMENTS), tokenizer, LENGTH, 10):
        text = tokenizer.decode(sample.tokens)
        found = re.fullmatch(
            r"A special magic number is hidden within the following text\. Make sure to memorize it\. I will quiz you "
            r"about the number afterwards\.\n(.*)\nWhat is the special magic number for (\w+-\w+) mentioned in the "
            r"provided text\? The special magic number for \2 mentioned in the provided text is",
            text,
        )
        before, after = found[1].split(f"One of the special magic numbers for {found[2]} is: {sample.answers[0]}.")
        assert len(before) / len(before + after) == pytest.approx(sample.depth / 100, abs=0.06)
        assert re.fullmatch(r"\d{7}", sample.answers[0])


@pytest.mark.parametrize(
    ("task", "num_needles"), [("niah_multikey", 4), ("niah_multivalue", 4), ("niah_multiquery", 4)]
)
def test_needles_of_the_keys_asked_for_are_the_answers(task, num_needles):
    tokenizer = byte_tokenizer()
    for sample in make_samples(task, Haystack(DOCUMENTS), tokenizer, LENGTH, 4):
        text = tokenizer.decode(sample.tokens)
        needles = re.findall(r"One of the special magic numbers for (\w+-\w+) is: (\d{7})\.", text)
        asked = re.findall(r"\w+-\w+", re.search(r"What (?:are all|is) the special magic numbers? for (.*)", text)[1])
        assert len(needles) == num_needles
        assert Counter(value for key, value in needles if key in asked) == Counter(sample.answers)


def test_the_variables_asked_for_are_those_of_the_chain():
    tokenizer = byte_tokenizer()
    for sample in make_samples("vt", Haystack(DOCUMENTS), tokenizer, LENGTH, 4):
        example, text = tokenizer.decode(sample.tokens).split("\n\nMemorize")
        for part, answers in ((text, sample.answers), (example, tuple(example.split(": ")[-1].split()))):
            values: dict[str, str] = {}
            for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part):  # in the order of the text
                values[name] = values.get(value, value)
            asked = re.search(r"assigned the value (\d+) in the text above", part)[1]
            assert {name for name, value in values.items() if value == asked} == set(answers)
            assert len(answers) == 5


@pytest.mark.parametrize("length", [LENGTH, 12000])
def test_the_words_asked_for_are_the_most_common_ones(length):
    tokenizer = byte_tokenizer()
    (sample,) = make_samples("cwe", Haystack(DOCUMENTS), tokenizer, length, 1)
    _, _, text = tokenizer.decode(sample.tokens).rpartition("Below is")
    counts = Counter(re.findall(r"\d+\. (\w+)", text)).most_common()
    assert {word for word, _ in counts[:10]} == set(sample.answers)
    assert (counts[9][1], counts[10][1]) == ((6, 1) if length < 4096 else (30, 3))


def test_text_without_sentences_is_cut_and_text_without_words_refused():
    code = Haystack([Document("a.py", "value = other ( first ) \n" * 100 + prose(0, 40))])
    assert max(len(sentence.split()) for sentence in code.sentences) == 60
    with pytest.raises(PhotonError, match="1 sentences and 0 different words"):
        Haystack([Document("a", "1 2 3")])
    with pytest.raises(PhotonError, match="no long task 'niah'.*niah_single"):
        make_samples("niah", code, byte_tokenizer(), LENGTH, 1)


def test_prompts_do_not_end_with_what_a_tokenizer_puts_behind_texts():
    tokenizer, end = byte_tokenizer(), "<|end|>"
    (expected,) = make_samples("niah_single", Haystack(DOCUMENTS), tokenizer, LENGTH - 1, 1)
    processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    (sample,) = make_samples("niah_single", Haystack(DOCUMENTS), tokenizer, LENGTH, 1)
    assert sample.tokens[0] == tokenizer.eos_token_id and sample.tokens[-1] == expected.tokens[-1]
    assert tokenizer.eos_token_id not in sample.tokens[1:]


def test_chat_templates_put_the_question_in_a_turn():
    tokenizer, haystack = byte_tokenizer(), Haystack(DOCUMENTS)
    with pytest.raises(PhotonError, match="no chat template"):
        make_samples("vt", haystack, tokenizer, LENGTH, 1, chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}Reply: "
    (sample,) = make_samples("niah_single", haystack, tokenizer, LENGTH, 1, chat_template=True)
    text = tokenizer.decode(sample.tokens)
    assert text.startswith("[A special magic number")
    assert re.search(r"in the provided text\?\]Reply: The special magic number for \S+ mentioned", text)
    assert LENGTH - 120 <= len(sample.tokens) + sample.max_new_tokens <= LENGTH


def test_a_score_is_the_share_of_answers_written():
    assert score(("12", "34", "Word"), " 34, word") == pytest.approx(2 / 3)
    assert score(("12",), "") == 0


@torch.no_grad()
def test_answers_in_batches_are_those_of_each_prompt_alone(model):
    """With prompts of different lengths, which are padded; likelihoods are those of the whole text's forward."""
    tokenizer, haystack = byte_tokenizer(), Haystack(DOCUMENTS)
    samples = [
        replace(sample, tokens=sample.tokens[-cut:], answer_tokens=sample.answer_tokens[: 8 - row], max_new_tokens=12)
        for task in ("niah_single", "vt")
        for row, (cut, sample) in enumerate(
            zip((90, 57, 71), make_samples(task, haystack, tokenizer, LENGTH, 3), strict=True)
        )
    ]
    caches, counts = [], []
    make_cache = (lambda: caches.append(DynamicCache()) or caches[-1]) if model.config.model_type == "llama" else None
    found = list(answer_samples(model, tokenizer, samples, 2, make_cache, counts.append))
    assert [answer.sample for answer in found] == samples
    assert counts == [90 + 57, 71] * 2
    assert len(caches) == (4 if make_cache else 0)
    for answer in found:
        prompt = torch.tensor([answer.sample.tokens])
        alone = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert answer.text == tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True)
        if answer.sample.task == "vt":
            assert answer.nll is None
            continue
        wanted = torch.tensor(answer.sample.answer_tokens)
        logits = model(torch.cat([prompt, wanted[None]], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        assert answer.nll == pytest.approx(F.cross_entropy(logits, wanted).item(), abs=2e-4)


def test_rows_hold_means_over_tasks_and_depths():
    def answer(task: str, depth: int | None, value: float, nll: float | None) -> Answer:
        return Answer(Sample(task, 64, depth, [], ("a",), [], 1), "", value, nll)

    singles = [answer("niah_single", depth, depth / 100, depth / 10) for depth in (0, 50, 100, 50)]
    found = retrieval_columns([*singles, answer("vt", None, 1.0, None)])
    assert found["ruler_tasks"] == {"niah_single": 0.5, "vt": 1.0}
    assert (found["ruler"], found["needle"], found["needle_nll"]) == (0.75, 0.5, 5.0)
    assert found["needle_by_depth"] == {"0": 0.0, "50": 0.5, "100": 1.0}
    assert found["needle_nll_by_depth"] == {"0": 0.0, "50": 5.0, "100": 10.0}
    assert retrieval_columns([])["ruler"] is None


def test_a_model_is_measured_at_every_length(model):
    settings = LongSettings(lengths=(700, 1400), sequences=2, samples=1, tasks=("niah_single", "niah_multikey"))
    tokenizer, counts = byte_tokenizer(), []
    inputs = prepare_long(DOCUMENTS, tokenizer, settings)
    assert 0 < estimate_seconds(model, inputs) < 600
    rows = list(evaluate_long(model, tokenizer, inputs, on_tokens=counts.append))
    assert sum(counts) == inputs.tokens_read == sum(row["tokens"] for row in rows)
    assert [row["length"] for row in rows] == [700, 1400]
    assert list(rows[1]["ce_by_position"]) == ["0-256", "256-1024", "1024-2048"]
    assert rows[0]["needle_nll"] == rows[0]["needle_nll_by_depth"]["0"] > 0
    assert all(set(row["ruler_tasks"]) == set(settings.tasks) for row in rows)
    without = list(evaluate_long(model, tokenizer, prepare_long(DOCUMENTS, tokenizer, replace(settings, samples=0))))
    assert [row["ce"] for row in without] == [row["ce"] for row in rows]
    assert without[0]["ruler"] is without[0]["needle"] is None


def test_the_command_compares_two_models(checkpoints, tmp_path, capsys):
    """One of them a GGUF file; the window of the other holds no needle."""
    (tmp_path / "text").mkdir()
    for document in DOCUMENTS:
        (tmp_path / "text" / document.name).write_text(document.text)
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    names = [str(file), str(checkpoints["photon"])]
    arguments = ["--model", *names, "--long", "--data", str(tmp_path / "text"), "--lengths", "2600", "2048"]
    arguments += ["--samples", "1", "--sequences", "1", "--device", "cpu", "--output", str(tmp_path / "rows.json")]
    main([*arguments, "--plot", str(tmp_path / "needles.png")])
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["length"]) for row in record["rows"]] == [(n, k) for n in names for k in (2048, 2600)]
    assert record["settings"]["samples"] == 1
    assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "minutes" in shown and "niah_multiquery" in shown
    assert f"{record['rows'][0]['ce']:.4f}" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lengths", "50"], "lengths from 64"),
        (["--data", "absent/texts/here"], "absent"),
        (["--lengths", "90000"], "90,000"),
    ],
)
def test_bad_requests_are_one_line(checkpoints, tmp_path, changes, message):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0].text)
    arguments = ["--model", str(checkpoints["dense"]), "--long", "--data", str(tmp_path / "a.txt"), *changes]
    with pytest.raises(PhotonError, match=message):
        main(arguments)
