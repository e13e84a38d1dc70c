"""Training on several processes: measured on this machine, and predicted for many GPUs."""
