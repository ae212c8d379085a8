"""Docstrings name other objects as Sphinx does (``:class:`Nowcaster```); the site shows them as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?(?P<name>[^`]+)`")


class Roles(griffe.Extension):
    """Turns roles into code spans."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda found: f"`{found['name'].rsplit('.', 1)[-1]}`", obj.docstring.value)
