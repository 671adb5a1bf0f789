"""The runner, what it checks before a training starts, its checkpoint files and its hooks."""
