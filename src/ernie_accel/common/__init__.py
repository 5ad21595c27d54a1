"""What every layer may use: files written whole or not at all, text for people, contact sheets. Imports no layer."""
