"""Programs around the project: the demonstration."""
