"""The real driver: the user's own loop through optimizer hooks, and one background thread."""
