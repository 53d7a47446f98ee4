"""Make each system call that writes fail."""
