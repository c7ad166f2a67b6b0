"""The parts of the conversion, imagesets/convert.py."""
