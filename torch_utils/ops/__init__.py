"""Image and activation operators with derivatives of every order."""
