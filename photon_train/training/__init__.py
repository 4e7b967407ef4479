"""Fine-tuning: LoRA, losses, the loop, checkpoints and tracking, for any causal LM of transformers."""
