"""Softmax attention whose score has the structure you choose (arXiv 2509.07963)."""

__version__ = "0.1.0"
