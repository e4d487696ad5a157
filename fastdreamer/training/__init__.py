"""A training run: its schedule, the worker beside it, and all that it keeps on disk."""
