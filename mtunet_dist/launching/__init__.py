"""Training processes on one node or on many: the agent that starts them, and how nodes find each other."""
