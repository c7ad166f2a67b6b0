"""PyTorch helpers that do not depend on StyleGAN."""
