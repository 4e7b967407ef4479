"""The fine-tuned model as a checkpoint that is served: weights, code, tokenizer, model card, manifest."""
