"""The doctor: known problems of this machine, checks that compute, and the backend that each operator uses here.

Only the worker process and the checks that it runs import torch, so that a broken driver or wheel is examined from
outside.
"""

from nybble.diagnostics.backends import BackendChoice, choose_backends
from nybble.diagnostics.environment import prepare
from nybble.diagnostics.evidence import Result
from nybble.diagnostics.examination import Report, doctor

__all__ = ["BackendChoice", "Report", "Result", "choose_backends", "doctor", "prepare"]
