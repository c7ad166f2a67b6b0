"""Find the latents of real images: the work of projector.py."""
