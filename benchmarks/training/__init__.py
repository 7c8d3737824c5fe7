"""Training steps beside plain PyTorch, and training on several processes."""
