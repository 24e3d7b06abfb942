"""Bytes per device: what a step holds, when, and what would make it fit."""
