"""The key-value cache of attention layers."""
