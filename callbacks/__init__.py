"""Attaching nowcasting to training frameworks."""
