"""Long contexts, measured: cross-entropy by position, and retrieval by length and depth, for any causal LM.

Likelihood alone hides lost retrieval, and retrieval alone what happens to ordinary text: a row has both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from photon_train.data.corpora import Document
from photon_train.errors import PhotonError
from photon_train.evaluation.positions import MakeCache, bucket_means, long_rows, position_losses
from photon_train.evaluation.retrieval import Answer, answer_samples
from photon_train.evaluation.ruler import SINGLE, TASKS, Haystack, Sample, make_samples


@dataclass(frozen=True)
class LongSettings:
    """What is measured.

    Attributes:
        lengths: Tokens of texts, and of prompts with their answers.
        sequences: Texts per length.
        samples: Prompts per task and length.
        tasks: Of `ruler.TASKS`.
        depths: Percent of the text before a single needle; its samples take them in turns.
        beyond: Tokens of a text that do not count as beyond the window.
        batch_size: Prompts that are answered at once.
        chat_template: Ask in the tokenizer's chat template.
        seed: Seed of prompts; texts do not depend on it.
    """

    lengths: tuple[int, ...] = (2048, 8192)
    sequences: int = 8
    samples: int = 20
    tasks: tuple[str, ...] = TASKS
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    beyond: int = 256
    batch_size: int = 4
    chat_template: bool = False
    seed: int = 0


@dataclass(frozen=True)
class LongInputs:
    """Texts and prompts in a tokenizer's tokens; models with the same tokenizer can share them.

    Attributes:
        settings: What they were made by.
        rows: Length -> texts, ``[N, length]``.
        samples: Length -> prompts of all tasks.
    """

    settings: LongSettings
    rows: dict[int, torch.Tensor] = field(repr=False)
    samples: dict[int, list[Sample]] = field(repr=False)

    @property
    def tokens_read(self) -> int:
        """Tokens of all texts and prompts."""
        prompts = sum(len(sample.tokens) for samples in self.samples.values() for sample in samples)
        return prompts + sum(rows.numel() for rows in self.rows.values())


def prepare_long(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, settings: LongSettings
) -> LongInputs:
    """Make texts and prompts; the same arguments make the same ones.

    Args:
        documents: Texts that no model here was trained on; their order decides which are used.
        tokenizer: Of the models that will be measured.
        settings: What is measured.

    Raises:
        PhotonError: if no document has the longest length, or prompts do not fit the shortest.
    """
    if min(settings.lengths) < 64 or settings.samples < 0 or settings.sequences < 1 or settings.batch_size < 1:
        raise PhotonError("long evaluation: take lengths from 64 on, and at least one sequence and row of a batch")
    haystack = Haystack(documents) if settings.samples else None
    rows, samples = {}, {}
    for length in settings.lengths:
        rows[length] = long_rows(documents, tokenizer, length, settings.sequences)
        samples[length] = [
            sample
            for task in (settings.tasks if haystack else ())
            for sample in make_samples(
                task,
                haystack,
                tokenizer,
                length,
                settings.samples,
                settings.seed,
                settings.depths,
                settings.chat_template,
            )
        ]
    return LongInputs(settings, rows, samples)


@torch.no_grad()
def estimate_seconds(model: PreTrainedModel, inputs: LongInputs) -> float:
    """About how long `evaluate_long` will take: a short and a longer text are read and a few tokens written.

    Reading n tokens takes a n + b n^2; writing a token takes as long whatever was read, which is right for the window
    and low for a dense model's longest prompts.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(inputs.settings.lengths)
    row = inputs.rows[longest][0]
    short, long = min(256, longest // 2), min(2048, longest)
    position_losses(model, row[:short])  # warm-up

    def read(count: int) -> float:
        start = time.perf_counter()
        position_losses(model, row[:count])
        return time.perf_counter() - start

    first, second = read(short), read(long)
    square = max(0.0, (second / long - first / short) / (long - short))
    linear = max(second / long - square * long, 0.0)
    seconds = sum(len(rows) * (linear * n + square * n * n) for n, rows in inputs.rows.items())
    batch = inputs.settings.batch_size
    tokens = row[:32].expand(batch, -1).to(device)
    start = time.perf_counter()
    model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, pad_token_id=0)
    step = (time.perf_counter() - start) / 8
    for samples in inputs.samples.values():
        seconds += sum(linear * len(s.tokens) + square * len(s.tokens) ** 2 for s in samples)
        seconds += step * sum(s.max_new_tokens for s in samples) / batch
    return seconds


def evaluate_long(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: LongInputs,
    make_cache: MakeCache | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure a dense or PHOTON causal LM, a length at a time.

    Args:
        model: On its device; it is left as it was.
        tokenizer: The one that `inputs` were made with.
        inputs: From `prepare_long`.
        make_cache: Makes the cache of each text or batch of prompts (a quantised one, one of a press); None: the
            model's own.
        on_tokens: Is told tokens as they are read; they sum to ``inputs.tokens_read``.

    Yields:
        A row per length, as soon as it is measured: ``length``, ``tokens`` (read), what `bucket_means` returns,
        ``ruler`` (mean score of the tasks), ``ruler_tasks``, ``needle`` (score of a single needle), ``needle_nll``,
        ``needle_by_depth`` and ``needle_nll_by_depth`` (percent of the text before it -> mean), ``seconds``. Scores lie
        in [0, 1], the rest is in nats; what was not asked for is None.
    """
    for length in inputs.settings.lengths:
        was_training = model.training
        model.eval()
        start = time.perf_counter()
        losses = [position_losses(model, row, make_cache, on_tokens) for row in inputs.rows[length]]
        samples = inputs.samples[length]
        answers = list(answer_samples(model, tokenizer, samples, inputs.settings.batch_size, make_cache, on_tokens))
        model.train(was_training)
        yield {
            "length": length,
            "tokens": inputs.rows[length].numel() + sum(len(sample.tokens) for sample in samples),
            **bucket_means(torch.stack(losses), inputs.settings.beyond),
            **retrieval_columns(answers),
            "seconds": round(time.perf_counter() - start, 1),
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def retrieval_columns(answers: Sequence[Answer]) -> dict[str, Any]:
    """The columns of retrieval of `evaluate_long`, from the answers to all prompts of a length."""
    tasks = list(dict.fromkeys(answer.sample.task for answer in answers))
    by_task = {task: _mean([a.score for a in answers if a.sample.task == task]) for task in tasks}
    single = [answer for answer in answers if answer.sample.task == SINGLE]
    depths = sorted({answer.sample.depth for answer in single})
    at = {depth: [answer for answer in single if answer.sample.depth == depth] for depth in depths}
    return {
        "ruler": _mean(list(by_task.values())),
        "ruler_tasks": by_task,
        "needle": by_task.get(SINGLE),
        "needle_nll": _mean([answer.nll for answer in single]),
        "needle_by_depth": {str(depth): _mean([a.score for a in at[depth]]) for depth in depths},
        "needle_nll_by_depth": {str(depth): _mean([a.nll for a in at[depth]]) for depth in depths},
    }
