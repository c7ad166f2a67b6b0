"""How phantoms are planned and drawn, for imagesets/phantoms/make.py."""
