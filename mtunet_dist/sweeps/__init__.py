"""Sweeps: the sweep file, the search space, the folder that is a sweep's whole state, and the ranking of its trials."""
