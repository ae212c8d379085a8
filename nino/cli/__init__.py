"""The command ``nino``: what a person does without writing a program."""

from nino.cli.main import main

__all__ = ["main"]
