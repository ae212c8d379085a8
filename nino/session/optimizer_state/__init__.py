"""What the optimizer keeps of the weights themselves."""
