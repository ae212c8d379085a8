"""Snapshots in, weights out; knows no optimizer and no clock."""
