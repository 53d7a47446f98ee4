"""Measurements: speed, memory and quality. Each file is a program: `python -m bench.speed.step --help`."""
