"""Whether a nowcast is kept or rolled back."""
