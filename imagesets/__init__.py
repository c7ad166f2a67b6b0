"""Image data sets on disk: made from archives of any kind, looked at, split, and read. Needs no torch."""
