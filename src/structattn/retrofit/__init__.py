"""Retrofitting: give a trained model with standard attention levels, and measure what it loses."""
