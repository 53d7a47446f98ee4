"""Linear attention, short convolutions and selective scans over the documents of a flattened batch."""
