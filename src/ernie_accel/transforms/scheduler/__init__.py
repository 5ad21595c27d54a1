"""Transforms of the scheduler: which sampler steps, and where its timesteps are."""
