"""Planning: the real step on fake tensors, and the fastest neutral settings within a budget.

live      bytes of live tensors, by what they are
step      one training step with its memory counted
curve     the same at any depth of recomputation, from a few layers
forecast  every phase of a run
choose    depth and split within a budget; what to change where nothing fits
make      the plan of a run
"""

from nybble.planning.devices import PROFILES, Profile, named_profile, profile_of
from nybble.planning.forecast import Batches
from nybble.planning.make import find_config, make_plan, plan, plan_training
from nybble.planning.shapes import SHAPES

__all__ = [
    "PROFILES",
    "SHAPES",
    "Batches",
    "Profile",
    "find_config",
    "make_plan",
    "named_profile",
    "plan",
    "plan_training",
    "profile_of",
]
