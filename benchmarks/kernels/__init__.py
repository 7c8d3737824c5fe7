"""Single operations beside their peers, at the shapes of the paper's tasks."""
