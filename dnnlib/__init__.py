"""Helpers that need no torch."""
