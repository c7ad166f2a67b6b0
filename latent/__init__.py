"""Make images from networks: latents of seeds, classes, sheets, labelled sets, mixed styles."""
