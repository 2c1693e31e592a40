"""The trained module, one optimiser step of it, and what keeps its numbers sound."""
