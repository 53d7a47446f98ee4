"""Reports, from run directories alone."""

from nybble.reporting.card import model_card
from nybble.reporting.render import write_report

__all__ = ["model_card", "write_report"]
