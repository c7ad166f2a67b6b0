"""What an inspection measures, finds and shows, for imagesets/inspection.py."""
