"""The machine a run lives on: its signals, its memory, and the points at which a test can kill it."""
