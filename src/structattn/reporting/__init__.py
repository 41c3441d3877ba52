"""Reporting: what a comparison found, as a table, a verdict, figures and one page."""
