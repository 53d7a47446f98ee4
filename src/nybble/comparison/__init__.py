"""Several methods, or several recipes, compared on the same rows."""

from nybble.comparison.figures import Arm, Comparison, Difference
from nybble.comparison.runner import compare
from nybble.intervals import Interval

__all__ = ["Arm", "Comparison", "Difference", "Interval", "compare"]
