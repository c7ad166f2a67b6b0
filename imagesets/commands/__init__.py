"""The commands of dataset_tool.py: their options, and what they print."""
