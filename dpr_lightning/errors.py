"""The two ways in which a run refuses to go on: the user's input, or numbers that stopped being numbers."""


class UserError(ValueError):
    """Something the user wrote or supplied cannot be used.

    The message is one line that names the key or row, what was found, and what to do. ``main`` prints it without
    a traceback and exits with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message says at which step and batch."""
