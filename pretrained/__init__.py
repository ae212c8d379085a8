"""Nowcasters that are installed with Nino, one folder each."""
