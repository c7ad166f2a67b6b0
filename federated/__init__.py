"""Train one network at several institutions, whose images never leave them."""
