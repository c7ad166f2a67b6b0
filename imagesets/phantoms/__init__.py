"""Phantoms, drawings of skin lesions: their data sets (make), attributes (scene) and rendering (paint, fields)."""
