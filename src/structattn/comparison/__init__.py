"""Comparison: one model per attention structure and seed, trained under one budget, with results on disk."""
