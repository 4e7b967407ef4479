"""Zero- and few-shot tasks through lm-evaluation-harness, for any causal LM of transformers, dense or PHOTON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from photon_train.errors import PhotonError


def open_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """The harness's task manager, which knows all of `tasks`.

    Args:
        tasks: Names of tasks or groups, as `lm_eval ls tasks` lists them.
        include_path: Directory with further tasks (YAML files of the harness).

    Raises:
        PhotonError: if the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PhotonError("the evaluation harness is not installed: pip install 'photon-train[eval]'") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise PhotonError(f"no task {', '.join(unknown)}: `lm_eval ls tasks` lists them; --include-path adds your own")
    return manager


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Metrics of every task (and group) as lm-evaluation-harness reports them.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: Names that `manager` knows.
        manager: From `open_tasks`.
        num_fewshot: Examples before each question; None: the task's own.
        limit: Questions per task; None: all.
        batch_size: Sequences per forward pass.

    Returns:
        Task -> metric (``acc,none``, ``acc_stderr,none``, ...) -> value.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
