"""Scores of generated text, their intervals, and the reports that show them."""
