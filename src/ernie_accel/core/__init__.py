"""The mechanism: what a transform is, how a plan is made, applied, reported and undone. ``api.py`` above starts it."""
