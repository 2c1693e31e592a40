"""Slurm: the batch scripts, how a submission is made from them, and the agent of one node of a job."""
