"""Parameter signatures, and the built-in GPT."""
