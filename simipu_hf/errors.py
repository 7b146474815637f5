"""The one exception that means "the user can fix this": the command line prints it without a traceback."""


class SimIPUError(ValueError):
    """Bad input. The message names the file or row, what was expected and what was found."""
