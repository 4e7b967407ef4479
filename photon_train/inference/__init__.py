"""Text from an exported model: one prompt with `generate_text`, many requests with the continuous-batching `Engine`."""
