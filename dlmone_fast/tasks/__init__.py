"""Tasks that the project brings along, with metrics of their own."""
