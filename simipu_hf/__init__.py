"""SimIPU pre-training the Hugging Face way."""

from pathlib import Path

from .version import __version__

# An uninstalled checkout keeps `modeling/` and `dataset_scripts/` beside this package instead of inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "modeling" / "modeling_simipu.py").is_file():
    __path__.append(str(_checkout))

__all__ = ["__version__"]
