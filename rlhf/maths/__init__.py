"""Free functions on tensors: every formula of the system, with its source, and no state."""
