"""Bytes on disk that survive a crash: atomic files and folders, checkpoints, and the cache. Import its modules."""
