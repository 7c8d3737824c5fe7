"""Losses of the three networks, each beside the equation it implements."""
