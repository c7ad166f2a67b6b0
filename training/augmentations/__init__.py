"""The parts of the augmentation pipeline, training/augment.py."""
