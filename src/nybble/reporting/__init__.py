"""Write reports, using only what run directories contain."""

from nybble.reporting.card import model_card
from nybble.reporting.compared import comparison_lines, rewrite_report, write_comparison_report
from nybble.reporting.ledger import ledger_lines
from nybble.reporting.pages import rows_page
from nybble.reporting.render import preference_figures, write_report

__all__ = [
    "comparison_lines",
    "ledger_lines",
    "model_card",
    "preference_figures",
    "rewrite_report",
    "rows_page",
    "write_comparison_report",
    "write_report",
]
