"""Several clients of one model: the engine that computes their answers together, and HTTP."""
