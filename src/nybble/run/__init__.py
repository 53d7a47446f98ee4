"""One run: its directory, its record, and the processes that carry it out. Import its modules."""
