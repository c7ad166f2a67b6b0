"""Project real images into the latent space of a network: the work of projector.py."""
