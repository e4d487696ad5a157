"""Triton bodies of the ops, one file per op of the same name; imported only when they run."""
