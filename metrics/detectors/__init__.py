"""Turn images into features whose statistics can be compared."""
