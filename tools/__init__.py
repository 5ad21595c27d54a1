"""Programs that made what the package carries; they are no part of it."""
