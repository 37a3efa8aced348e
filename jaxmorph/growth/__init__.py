"""What will happen to a run: operations, schedule files, the plan. No arrays, and no JAX."""
