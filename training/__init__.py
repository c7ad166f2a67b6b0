"""Train, configure and store StyleGAN2-ADA networks."""
