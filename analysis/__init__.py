"""Test what synthetic images are worth: protocols, classifiers trained on real and synthetic images."""
