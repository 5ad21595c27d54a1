"""What every floor may use: files that are whole or not there, text for people, contact sheets. Knows nothing else."""
