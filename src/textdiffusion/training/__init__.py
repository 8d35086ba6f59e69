"""Learning: the optimiser step, checkpoints that are never half there, and where figures are sent."""
