"""The one exception that bad input raises in the trainer."""


class InputError(Exception):
    """Input that cannot be used: its message is one sentence that names the thing and the remedy.

    The commands print it as a single line and exit with code 2. Under torchrun each
    machine's first rank prints it.
    """


class RankInputError(InputError):
    """Bad input that one rank met alone, in its part of the data: that rank prints it."""
