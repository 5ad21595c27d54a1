"""Linear layers in fewer bits: schemes, backends (one per file), choice of layers, and the guard against casts."""
