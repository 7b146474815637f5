"""What must never be unpickled."""

from pathlib import Path


class Payload:
    """Would write a file if it were."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
