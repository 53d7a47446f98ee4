"""What is wrong with this machine, what computes rightly on it, and which path each operator takes here.

Nothing here imports torch but the process that computes (`worker`) and what it runs: a broken driver or wheel is looked
at from outside.
"""

from nybble.diagnostics.backends import BackendChoice, choose_backends
from nybble.diagnostics.environment import prepare
from nybble.diagnostics.evidence import Result
from nybble.diagnostics.examination import Report, doctor

__all__ = ["BackendChoice", "Report", "Result", "choose_backends", "doctor", "prepare"]
