"""Wires any model by tracing it."""
