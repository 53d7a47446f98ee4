"""Kills trainings at random moments and resumes them."""
