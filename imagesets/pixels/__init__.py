"""From the bytes of an image file to the pixels and bytes of a data set."""
