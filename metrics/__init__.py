"""Measure generated images against real ones."""
