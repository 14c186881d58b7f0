"""What became of each parameter, and optimizers that follow."""
