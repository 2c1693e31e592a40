"""What several tests use: small trainings, damage, and clusters of their own."""
