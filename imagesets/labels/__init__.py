"""Tables of labels, and the choice of classes from them."""
