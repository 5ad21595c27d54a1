"""Pipelines in folders: write one, read it back, and trust nothing in a folder that comes from somebody else."""
