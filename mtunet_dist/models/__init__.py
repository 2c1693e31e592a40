"""Models: one family per file. ``PLUGIN(outputs, **options)``; forward(image) -> {task: (N, channels, H, W)}."""
