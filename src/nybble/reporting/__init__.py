"""Reports, from run directories alone."""

from nybble.reporting.card import model_card
from nybble.reporting.ledger import ledger_lines
from nybble.reporting.pages import rows_page
from nybble.reporting.render import write_report

__all__ = ["ledger_lines", "model_card", "rows_page", "write_report"]
