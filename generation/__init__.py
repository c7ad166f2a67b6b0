"""Make images with trained networks: the work of generate.py."""
