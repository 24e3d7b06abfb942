"""Reads the text of compiled XLA programs."""
