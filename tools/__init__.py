"""Developers' programs, which are not installed with the package."""
