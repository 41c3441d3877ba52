"""What makes the ops of this package usable from the libraries people already have, a module for each library.

Nothing is imported here: `structattn.integrations.transformers` imports transformers when it is imported itself.
"""
