"""Tables, figures and the page that a run's records become. Reads records, never torch."""

from routing_experts.reports.html import write_report
from routing_experts.reports.table import print_results, results_markdown

__all__ = ["print_results", "results_markdown", "write_report"]
