"""Compare attention structures under one budget, with results on disk."""
