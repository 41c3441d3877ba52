"""The attention op: the hierarchy that shapes the score, one face, and its backends."""
