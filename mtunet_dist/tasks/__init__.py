"""Tasks: what a network predicts for each pixel, one kind per file. ``_task.py`` says what a file must have."""
