"""How phantoms are planned and drawn, for imagesets/phantom.py."""
