"""Kill trainings at random moments and resume them."""
