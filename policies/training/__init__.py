"""Training under a policy: what is trained, optimizer state, rounding and gradients of stored parameters."""
