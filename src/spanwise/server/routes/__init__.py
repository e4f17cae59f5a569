"""What each route does, from a checked request to its answer."""
