"""The loop: that it learns, that accumulation and resuming change nothing, and that it stops when it must."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_training import losses, tiny_data, tiny_model, tiny_run

from photon_train.config import DistillSettings, RunConfig
from photon_train.errors import PhotonError
from photon_train.training import loop
from photon_train.training.accelerator import make_accelerator
from photon_train.training.checkpoint import checkpoint_dir, latest_checkpoint, read_state, run_settings, text_hashes
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import TrainResult, train
from photon_train.training.lora import add_lora

TRAIN, EVAL = tiny_data(14, seed=1), tiny_data(7, seed=2)


class Crash(Exception):
    """Stands for whatever ends a process."""


def run(config: RunConfig, output, model: str = "llama", seed: int = 0, **kwargs) -> TrainResult:
    student = add_lora(tiny_model(model, seed=seed), config.lora, config.seed)
    return train(student, TRAIN, EVAL, config, output, **kwargs)


def crash_at(last: int):
    def on_step(step: int) -> None:
        if step == last:
            raise Crash

    return on_step


@pytest.mark.parametrize("model", ["llama", "memory", "block-2"])
def test_training_lowers_the_loss_and_writes_what_it_says(model, tmp_path):
    config = tiny_run(max_steps=20, save_every=0, eval_every=10)
    if model == "memory":
        config.distill = DistillSettings(weight=0.1, hidden_weight=0.1)
    result = run(config, tmp_path, model, name="student", extra_log={"kv_ratio": 0.125})
    seen = losses(result.history, "eval/ce")
    assert [r["step"] for r in result.history if "eval/ce" in r] == [0, 10, 20]
    assert seen[0] == result.initial_ce and seen[-1] == result.metrics["eval/ce"] < seen[0]
    assert result.metrics["eval/perplexity"] == pytest.approx(math.exp(seen[-1]))
    assert result.metrics["kv_ratio"] == 0.125
    assert len(losses(result.history)) == 20
    taught = {"train/distill", "train/distill_hidden"} if model == "memory" else set()
    assert {key for key in result.metrics if "distill" in key} == taught
    assert {"train/ce", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= result.metrics.keys()
    assert (result.steps, result.tokens) == (20, 20 * 4 * 24) and result.seconds > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and all(line["name"] == "student" for line in lines)
    assert result.checkpoint == tmp_path / "checkpoints" / "student" / "step_000020"


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"batch_size": 1, "gradient_accumulation_steps": 4}]
)
@pytest.mark.parametrize("model", ["llama", "memory"])
def test_how_a_step_is_computed_does_not_change_it(model, changes, tmp_path):
    """Recomputed activations, and accumulation over sequences with unequal numbers of targets."""
    plain = run(tiny_run(save_every=0), tmp_path / "plain", model)
    other = run(tiny_run(save_every=0, **changes), tmp_path / "other", model)
    for key in ("train/loss", "train/grad_norm", "eval/ce"):
        assert losses(other.history, key) == pytest.approx(losses(plain.history, key), rel=1e-5), key


@pytest.mark.parametrize("rank", [0, 4])
def test_a_16_bit_checkpoint_is_trained_in_fp32_without_mixed_precision(rank, tmp_path):
    """In bf16 updates of a usual size are rounded away: 85% of the new modules' weights never changed."""
    config = tiny_run({"rank": rank}, learning_rate=1e-4, new_modules_learning_rate=1e-4, max_steps=6, save_every=0)
    student = add_lora(tiny_model("memory").bfloat16(), config.lora, config.seed)
    before = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad and p.ndim > 1}
    train(student, TRAIN, EVAL, config, tmp_path)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    after = dict(student.named_parameters())
    # Rows of tokens that the text does not hold, and what a zero gate hides, get no gradient.
    moved = [bool((after[name] != value).any(-1).float().mean() > 0.9) for name, value in before.items()]
    assert all(moved)


def test_full_fine_tuning(tmp_path):
    result = run(tiny_run({"rank": 0}, max_steps=8), tmp_path, "block-2")
    assert result.metrics["eval/ce"] < result.initial_ce


@pytest.mark.parametrize("model", ["llama", "block-2"])
def test_bf16_trains_fp32_copies_of_bf16_weights(model, tmp_path, fresh_accelerator):
    config = tiny_run(mixed_precision="bf16", max_steps=10)
    student = add_lora(tiny_model(model).bfloat16(), config.lora)
    result = train(student, TRAIN, EVAL, config, tmp_path)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert result.metrics["eval/ce"] < result.initial_ce


def test_one_accelerator_serves_one_training_after_another(tmp_path):
    config = tiny_run(max_steps=3)
    accelerator = make_accelerator(config, tmp_path)
    dense = run(config, tmp_path, "llama", name="dense", accelerator=accelerator)
    photon = run(config, tmp_path, "block-2", accelerator=accelerator)
    alone = run(config, tmp_path / "alone", "block-2")
    assert losses(photon.history) == losses(alone.history) != losses(dense.history)
    state = gather_full_model(accelerator, photon.model)
    assert state.keys() == tiny_model("block-2").state_dict().keys()
    names = [json.loads(line)["name"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert names == ["dense"] * len(dense.history) + ["photon"] * len(photon.history)


@pytest.mark.parametrize("model", ["llama", "memory"])
def test_a_resumed_run_is_bit_identical(model, tmp_path):
    """Three steps, a crash, new objects, three steps: the same numbers as six steps (dropout draws included)."""
    config = tiny_run({"dropout": 0.2})
    straight = run(config, tmp_path / "straight", model)
    with pytest.raises(Crash):
        run(config, tmp_path / "resumed", model, on_step=crash_at(5))
    config.resume = True
    resumed = run(config, tmp_path / "resumed", model)
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/ce", "train/tokens"):
        assert losses(resumed.history, key) == losses(straight.history, key), key
    assert [r["step"] for r in resumed.history] == [r["step"] for r in straight.history]
    assert (resumed.initial_ce, resumed.tokens) == (straight.initial_ce, straight.tokens)
    states = [result.model.state_dict() for result in (resumed, straight)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    config = tiny_run()
    first = run(config, tmp_path)
    config.resume = True
    again = run(config, tmp_path, seed=0, on_step=crash_at(1))
    assert again.metrics == first.metrics and again.history == first.history
    states = [result.model.state_dict() for result in (first, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_checkpoints_hold_trained_weights_only_and_the_newest_are_kept(tmp_path):
    from safetensors.torch import load_file

    config = tiny_run(save_every=2, keep_checkpoints=2)
    result = run(config, tmp_path)
    directory = checkpoint_dir(tmp_path, "photon")
    assert sorted(path.name for path in directory.iterdir()) == ["step_000004", "step_000006"]
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert load_file(directory / "step_000006" / "model.safetensors").keys() == trained


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    config = tiny_run(save_every=2)
    run(config, tmp_path)
    directory = checkpoint_dir(tmp_path, "photon")
    (directory / "step_000006" / "manifest.json").unlink()
    leftover = directory / ".step_000008.0123456789ab"
    leftover.mkdir()
    assert latest_checkpoint(directory) == directory / "step_000004"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    config.resume = True
    assert run(config, tmp_path).steps == 6
    assert not leftover.exists() and latest_checkpoint(directory) == directory / "step_000006"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    config = tiny_run(save_every=2)
    straight = run(config, tmp_path)
    file = checkpoint_dir(tmp_path, "photon") / "step_000006" / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a disk
    file.write_bytes(content)
    config.resume = True
    seen = []
    resumed = run(config, tmp_path, on_step=seen.append)
    assert seen == [5, 6] and losses(resumed.history) == losses(straight.history)
    assert "optimizer.bin was changed" in caplog.text


def test_the_best_score_is_restored(tmp_path, monkeypatch):
    config, evaluate, scored = tiny_run(max_steps=6, eval_every=1), loop.evaluate, []

    def last_is_worse(*arguments):
        """By a nat: which step of a wild training is best, processors decide."""
        scored.append(evaluate(*arguments))
        return scored[-1] + (len(scored) == 7)

    monkeypatch.setattr(loop, "evaluate", last_is_worse)
    run(config, tmp_path)
    path = checkpoint_dir(tmp_path, "photon") / "step_000006"
    state = json.loads((path / "training_state.json").read_text())
    scores = {r["step"]: r["eval/ce"] for r in map(json.loads, open(tmp_path / "metrics.jsonl")) if "eval/ce" in r}
    assert state["best_ce"] == min(scores.values()) == scores[state["best_step"]] < scores[6]


def test_a_full_disk_is_one_error_and_costs_no_checkpoint(tmp_path, monkeypatch):
    import accelerate

    save = accelerate.Accelerator.save_state

    def full(self, directory, **kwargs):
        save(self, directory, **kwargs)
        if "step_000004" in directory:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(accelerate.Accelerator, "save_state", full)
    config = tiny_run(save_every=2)
    with pytest.raises(PhotonError, match=r"step_000004 cannot be written .*the disk has room.*--resume") as caught:
        run(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoint_dir(tmp_path, "photon").iterdir()] == ["step_000002"]


def test_a_disk_that_fills_between_checkpoints_loses_no_record(tmp_path):
    config, metrics = tiny_run(save_every=2), tmp_path / "run" / "metrics.jsonl"
    straight = run(config, tmp_path / "straight")

    def fill(step: int) -> None:
        if step == 3:  # half a line is what a full disk may leave
            metrics.rename(tmp_path / "kept")
            metrics.symlink_to("/dev/full")

    with pytest.raises(PhotonError, match=r"metrics.jsonl cannot be written \(No space left on device\).*--resume"):
        run(config, tmp_path / "run", on_step=fill)
    with open(tmp_path / "kept", "a") as file:
        file.write('{"name": "photon", "st')
    (tmp_path / "kept").replace(metrics)
    config.resume = True
    assert losses(run(config, tmp_path / "run").history) == losses(straight.history)


def test_what_may_change_with_the_number_of_processes(tmp_path):
    run(tiny_run(max_steps=3), tmp_path)
    config = tiny_run(max_steps=3)
    path = checkpoint_dir(tmp_path, "photon") / "step_000003"
    same = {"num_processes": 1, "text": text_hashes(TRAIN, EVAL)}
    assert read_state(path, run_settings(config, "photon", **same)).step == 3
    message = r"sequences per step \(processes x .* \(checkpoint: 4, now: 8\)"
    with pytest.raises(PhotonError, match=message):
        read_state(path, run_settings(config, "photon", **{**same, "num_processes": 2}))
    message = r"sharding \(checkpoint: 'none', now: 'zero2'\).*the accelerate config that it was begun with"
    with pytest.raises(PhotonError, match=message):
        read_state(path, run_settings(config, "photon", **same, sharding="zero2"))
    config.train.batch_size = 2
    assert read_state(path, run_settings(config, "photon", **{**same, "num_processes": 2})).num_processes == 1


@pytest.mark.parametrize(("train_seed", "eval_seed", "which"), [(3, 2, "training"), (1, 4, "held-out")])
def test_a_resume_with_as_much_other_text_is_refused(train_seed, eval_seed, which, tmp_path):
    """The number of sequences alone was compared."""
    config = tiny_run(max_steps=1, save_every=1)
    run(config, tmp_path)
    config.resume = True
    student = add_lora(tiny_model("llama"), config.lora, config.seed)
    other = tiny_data(14, seed=train_seed), tiny_data(7, seed=eval_seed)
    with pytest.raises(PhotonError, match=rf"hash of the {which} text \(checkpoint: .*give the text that it was begun"):
        train(student, *other, config, tmp_path)


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = tiny_run(save_every=2)
    import accelerate

    save, calls = accelerate.Accelerator.save_state, []

    def failing(self, directory, **kwargs):
        save(self, directory, **kwargs)
        calls.append(directory)
        if len(calls) == 2:
            raise Crash

    monkeypatch.setattr(accelerate.Accelerator, "save_state", failing)
    with pytest.raises(Crash):
        run(config, tmp_path)
    directory = checkpoint_dir(tmp_path, "photon")
    assert [path.name for path in directory.iterdir()] == ["step_000002"]
    config.resume = True
    assert run(config, tmp_path).steps == 6


def test_resuming_with_other_settings_names_them(tmp_path):
    run(tiny_run(max_steps=3), tmp_path)
    config = tiny_run({"rank": 2}, max_steps=3, learning_rate=0.5, log_every=2)
    config.resume, config.seed = True, 7
    with pytest.raises(PhotonError) as caught:
        run(config, tmp_path)
    message = str(caught.value)
    assert "lora.rank (checkpoint: 4, now: 2)" in message and "\n" not in message
    assert "train.learning_rate (checkpoint: 0.01, now: 0.5)" in message and "seed (checkpoint: 0, now: 7)" in message
    assert "log_every" not in message and "warmup" not in message


def test_resuming_with_another_model_or_a_broken_state_is_refused(tmp_path):
    config = tiny_run(max_steps=3)
    run(config, tmp_path)
    config.resume = True
    with pytest.raises(PhotonError, match="model.safetensors does not fit the model"):
        run(config, tmp_path, "block-2")
    (checkpoint_dir(tmp_path, "photon") / "step_000003" / "training_state.json").write_text('{"step": 3')
    with pytest.raises(PhotonError, match="no checkpoint .* is whole: .*training_state.json .*remove that folder"):
        run(config, tmp_path)


def test_weights_that_overflow_end_the_run_with_one_line(tmp_path):
    model = add_lora(tiny_model("llama"), tiny_run().lora)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(PhotonError, match="held-out cross-entropy at step 0 is nan") as caught:
        train(model, TRAIN, EVAL, tiny_run(), tmp_path)
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(checkpoint_dir(tmp_path, "photon")) is None


@pytest.fixture
def fresh_accelerator():
    """Another precision than the other tests': accelerate keeps one per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
