"""How a split is asked for, dealt and written, for imagesets/split.py."""
