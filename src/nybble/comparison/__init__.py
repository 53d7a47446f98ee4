"""Several methods, or several recipes, on the same rows, held against each other."""

from nybble.comparison.figures import Arm, Comparison, Difference
from nybble.comparison.run import compare
from nybble.intervals import Interval

__all__ = ["Arm", "Comparison", "Difference", "Interval", "compare"]
