"""The parts of the projection of images into the latent space."""
