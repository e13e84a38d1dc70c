"""Checks and measurements in a few minutes on a GPU: `make gpu`, `make gpu-pack`, and a rehearsal."""
