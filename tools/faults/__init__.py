"""Lets each system call that writes fail."""
