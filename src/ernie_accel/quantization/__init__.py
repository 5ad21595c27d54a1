"""Linear layers in fewer bits: schemes, backends (one a file), which layers, and the guard against casts."""
