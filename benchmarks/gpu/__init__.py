"""All evidence from a few minutes on a GPU: `make gpu`, with `make gpu-pack` before it and a rehearsal."""
