"""The parts of ``reproduce``: the trainings of each table, how they are started, and the drawings."""
