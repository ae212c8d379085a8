"""One training run: what happens after each optimizer step."""

from nino.session.session import NowcastSession

__all__ = ["NowcastSession"]
