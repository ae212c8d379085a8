"""One nowcast in a run: predict, move the weights, and undo it if anything fails."""
