"""Comparison: attention structures trained under one budget, with results on disk."""
