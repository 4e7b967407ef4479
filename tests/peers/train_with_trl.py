"""Trains an export with TRL, without photon-train: `train_with_trl.py EXPORT OUTPUT`.

Writes ``OUTPUT/results.json``: per training its losses and how far the saved models are from the trained one.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

# An import of a name that is None here fails as if the package were not installed.
sys.modules["photon_train"] = sys.modules["photon_kernels"] = None

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

EXPORT, OUTPUT = map(Path, sys.argv[1:])
STEPS = 24
WORDS = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")
# Longer than the export's window, and learned from few steps.
PROMPTS = [f"{one}, {two}, {one}, {two}: what comes next? It is " for one in WORDS for two in WORDS if one != two]
ANSWERS = [f"{prompt.split(',')[0]}, of course" for prompt in PROMPTS]
REFUSALS = [f"{prompt.split(',')[0]}? No idea" for prompt in PROMPTS]
ROWS = {
    "sft": [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)],
    "dpo": [
        {"prompt": prompt, "chosen": answer, "rejected": refusal}
        for prompt, answer, refusal in zip(PROMPTS, ANSWERS, REFUSALS, strict=True)
    ],
}
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


@torch.no_grad()
def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of the logits of two texts, one of them padded."""
    batch = tokenizer(PROMPTS[:2] + ["pink"], return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    return float((model.eval()(**batch).logits - other.eval()(**batch).logits)[real].abs().max())


def train(kind: str, adapters: bool, **options: object) -> dict[str, object]:
    """One training with TRL: losses, and the differences that have to be 0, or must not be."""
    directory = OUTPUT / f"{kind}-{'lora' if adapters else 'full'}"
    settings = {
        "output_dir": str(directory / "checkpoints"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2 if adapters else 2e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "trust_remote_code": True,
        **options,
    }
    targets = {"sft": "all-linear", "dpo": LINEAR_LAYERS}[kind]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM") if adapters else None
    make, arguments = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    dataset = Dataset.from_list(ROWS[kind])
    trainer = make(
        model=str(EXPORT),
        args=arguments(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trained = trainer.model
    result = {
        "code": type(trained.get_base_model() if adapters else trained).__module__,
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "moved": difference(trained, load(EXPORT)),
    }
    trainer.save_model(str(directory))
    if not adapters:
        return result | {"reloaded": difference(trained, load(directory))}
    reloaded = PeftModel.from_pretrained(load(EXPORT), directory)
    result["reloaded"] = difference(trained, reloaded)
    merged = reloaded.merge_and_unload()
    result["merged"] = difference(trained, merged)
    merged.save_pretrained(directory / "merged")
    return result | {"merged_reloaded": difference(trained, load(directory / "merged"))}


tokenizer = AutoTokenizer.from_pretrained(EXPORT, trust_remote_code=True)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
RUNS = {
    "sft-lora": ("sft", True, {}),
    "sft-full": ("sft", False, {}),
    "sft-packed": ("sft", False, {"packing": True, "max_length": 256}),
    "dpo-lora": ("dpo", True, {"learning_rate": 2e-2}),
    "dpo-full": ("dpo", False, {}),
}
results = {}
for name, (kind, adapters, options) in RUNS.items():
    try:
        results[name] = train(kind, adapters, **options)
    except Exception:
        results[name] = {"error": traceback.format_exc()}
(OUTPUT / "results.json").write_text(json.dumps(results, indent=1))
