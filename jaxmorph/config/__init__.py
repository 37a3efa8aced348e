"""Settings and their checks, and what a run starts with. Loads no JAX."""
