"""The one exception that bad input raises in the trainer."""


class InputError(Exception):
    """Input that cannot be used: its message is one sentence that names the thing and the remedy.

    The commands print it as a single line and exit with code 2.
    """
