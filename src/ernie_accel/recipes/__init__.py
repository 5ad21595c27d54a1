"""Which transforms go together: presets.py by name and by card, recommend.py for a machine."""
