"""Runner, checks before training, checkpoint files, hooks and inference."""
