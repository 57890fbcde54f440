"""A page from a Jinja template. Every value is HTML-escaped there, and a name that does not exist is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def rendered(template: Path, values: Mapping[str, Any], filters: Sequence[Callable[..., str]] = ()) -> str:
    """The page of a template file; it knows `filters` by their own names."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {text_filter.__name__: text_filter for text_filter in filters}
    return environment.get_template(template.name).render(values)
