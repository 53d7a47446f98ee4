"""Feed every reader of foreign files with inputs that are nearly right."""
