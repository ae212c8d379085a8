"""Many stacked models, trained and nowcast side by side."""
