"""Image data sets on disk: convert archives of any kind, inspect, split and read them. Does not import torch."""
