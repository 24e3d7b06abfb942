"""Layouts for the state of an optax chain."""
