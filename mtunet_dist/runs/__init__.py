"""A run and its folder: its start and resume, checkpoints, metrics, pictures and provenance."""
