"""Loss weightings: one per file. ``PLUGIN(tasks, **options)``; forward(losses) -> total, end_epoch()."""
