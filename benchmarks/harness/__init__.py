"""The timing itself: checked results, races against peers, records with their environment."""
