"""Transforms of calls of the pipe: defaults, autocast, checks, warm-up."""
