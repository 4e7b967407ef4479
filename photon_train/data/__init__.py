"""Text to training batches: corpora, packing, the loader, and the small dense model of the demo."""
