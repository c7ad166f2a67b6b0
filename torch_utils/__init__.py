"""PyTorch helpers that know nothing of StyleGAN."""
