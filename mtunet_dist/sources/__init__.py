"""Sources: what reads a published dataset, one per file. ``PLUGIN(root, **options)``; see ``_source.py``."""
