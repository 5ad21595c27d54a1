"""Compute fewer of a picture's steps in full. One backend a file; cache_steps.py is the transform."""
