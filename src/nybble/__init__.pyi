"""What type checkers and editors see of `nybble`: its names, which `__init__.py` loads when they are first used."""

from nybble.comparison import compare as compare
from nybble.diagnostics import doctor as doctor
from nybble.errors import NybbleError as NybbleError
from nybble.exporting import export as export
from nybble.exporting import merge as merge
from nybble.generation import Chat as Chat
from nybble.generation import ask as ask
from nybble.interruptions import resume_check as resume_check
from nybble.models import NybbleConfig as NybbleConfig
from nybble.models import register as register
from nybble.models.four_bit_folder import quantize as quantize
from nybble.pipeline import demo as demo
from nybble.pipeline import inspect_rows as inspect_rows
from nybble.pipeline import probe as probe
from nybble.pipeline import report as report
from nybble.pipeline import train as train
from nybble.planning import plan as plan
from nybble.recipe import Recipe as Recipe
from nybble.recipe import load_recipe as load_recipe
from nybble.run.record import Observer as Observer
from nybble.run.record import StepEvent as StepEvent

__version__: str
__all__ = [
    "Chat",
    "NybbleConfig",
    "NybbleError",
    "Observer",
    "Recipe",
    "StepEvent",
    "ask",
    "compare",
    "demo",
    "doctor",
    "export",
    "inspect_rows",
    "load_recipe",
    "merge",
    "plan",
    "probe",
    "quantize",
    "register",
    "report",
    "resume_check",
    "train",
]
