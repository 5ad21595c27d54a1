"""The mechanism: what a transform is, how a plan is made, applied, reported and undone. Start at ``optimize.py``."""
