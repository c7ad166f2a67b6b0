"""Images of trained networks: what generate.py makes."""
