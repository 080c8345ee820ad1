"""The search for the best slice of a model on the user's own data."""
