"""Training a nowcaster on recorded trajectories."""
