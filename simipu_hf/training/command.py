"""Moved to `simipu_hf.errors`."""

from simipu_hf.errors import TrainingInterrupted, exit_code_of

__all__ = ["TrainingInterrupted", "exit_code_of"]
