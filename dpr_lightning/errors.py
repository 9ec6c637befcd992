"""Why a run does not go on: the user's input, numbers that stopped being numbers, no room, or nothing to do."""


class UserError(ValueError):
    """Something the user wrote or supplied cannot be used.

    The message is one line that names the key or row, what was found, and what to do. ``main`` prints it without
    a traceback and exits with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message says at which step and batch."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why and what is left."""


class RunIsFinished(Exception):  # noqa: N818
    """The run has reached its end before; ``main`` prints the message and exits with status 0."""
