"""Studies: attention structures compared under one budget, with a table, figures and a report."""
