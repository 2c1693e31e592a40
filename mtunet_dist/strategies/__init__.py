"""Strategies: how a MultiTaskStep is run on one or many processes, one per file; see ``_strategy.py``."""
