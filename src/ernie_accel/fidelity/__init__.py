"""How close a changed pipe stays to the original, and what the change buys: metrics, `evaluate`, its artifacts."""
