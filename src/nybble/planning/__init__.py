"""Planning: the real step on fake tensors, and the fastest neutral settings within a budget.

live      bytes of live tensors, by what they are
step      one training step with its memory counted
shards    what one of several processes holds and gathers
curve     the same at any depth of recomputation, from a few layers
forecast  every phase of a run
choose    depth and split within a budget; what to change where nothing fits
make      the plan of a run
processes what several processes take and send
"""

from nybble.planning.devices import PROFILES, Profile, named_profile, profile_of
from nybble.planning.distributed import (
    SharedPlan,
    among,
    plan_processes,
    plan_shared,
    plan_training,
    share_of,
)
from nybble.planning.phases import Batches
from nybble.planning.planner import find_config, make_plan, plan
from nybble.recipe.shapes import SHAPES

__all__ = [
    "PROFILES",
    "SHAPES",
    "Batches",
    "Profile",
    "SharedPlan",
    "among",
    "find_config",
    "make_plan",
    "named_profile",
    "plan",
    "plan_processes",
    "plan_shared",
    "plan_training",
    "profile_of",
    "share_of",
]
