"""Model folders, training checkpoints, and the import of DiffuSeq checkpoints."""
