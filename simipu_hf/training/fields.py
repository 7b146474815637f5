"""Fields of argument dataclasses."""

from dataclasses import field
from typing import Any


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that is a command-line flag, with its help; a list becomes a default of its own each time."""
    metadata = {"help": text, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
