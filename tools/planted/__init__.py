"""Faults planted on purpose, one in each area, to show that the tests notice them."""
