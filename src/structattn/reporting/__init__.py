"""Report a comparison as a table, a verdict, figures and one page."""
