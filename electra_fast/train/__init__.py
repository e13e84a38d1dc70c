"""Training: a run from text to a model, with its loader, step, metrics, checkpoints and log."""
