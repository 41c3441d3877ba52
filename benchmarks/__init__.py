"""Benchmarks: tables of cases, samples out as JSON, reports rendered from it."""
