"""One training step: the state, the gradient, the update rule, and the sharding of arrays."""
