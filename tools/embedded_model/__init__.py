"""How the embedded model was made: its architecture, its corpus, its trainer and the measures of its card."""
