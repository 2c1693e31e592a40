"""The report of a sweep: tables, pictures and TensorBoard's HParams."""
