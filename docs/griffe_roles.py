"""The site shows the roles of docstrings (``:class:`Nowcaster```) and their examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?(?P<name>[^`]+)`")

EXAMPLE = re.compile(r"^( *)Example:$", re.M)
"""A section of one example; Google's style knows it in the plural only."""


class Roles(griffe.Extension):
    """Turns roles into code spans."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: f"`{found['name'].rsplit('.', 1)[-1]}`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
