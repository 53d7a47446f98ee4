"""What is wrong with this machine, what computes rightly on it, and which path each operator takes here.

Nothing here imports torch but the process that computes (`worker`) and what it runs: a broken driver or wheel is looked
at from outside.
"""

from nybble.diagnostics.environment import prepare
from nybble.diagnostics.evidence import Result
from nybble.diagnostics.examination import Report, doctor
from nybble.diagnostics.rungs import Rung, measured_rates, settle

__all__ = ["Report", "Result", "Rung", "doctor", "measured_rates", "prepare", "settle"]
