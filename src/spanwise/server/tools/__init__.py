"""Tool calls: what a request offers, how a model writes them, and how they are read back."""
