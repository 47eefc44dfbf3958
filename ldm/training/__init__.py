"""Training: the world of shapes and its checker, data, objectives, and the trainer on Lightning (extra `train`)."""
