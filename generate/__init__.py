"""Generative models and what they share; the optional part `generate`."""
