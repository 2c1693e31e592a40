"""What ``reproduce`` is made of: which trainings make up which table, how they are started, and what is drawn."""
