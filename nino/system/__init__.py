"""Files that appear whole, signals that wait, tensors in pieces."""
