"""Diffusers' own pipeline tests, run on pipelines that were passed through ``ernie_accel.optimize`` first."""
