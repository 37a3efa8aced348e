"""One training step: the state it maps, the gradient, the update rule, and where arrays lie."""
