"""Helpers that do not need PyTorch."""
