"""How good a model is, and the report of a run."""
