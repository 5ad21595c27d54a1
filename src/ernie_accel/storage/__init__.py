"""Pipelines in folders: write one, read it back, and trust nothing in a folder from elsewhere."""
