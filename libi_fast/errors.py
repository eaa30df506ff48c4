"""The one exception for input a caller can mend."""


class InputError(ValueError):
    """Bad data, a bad argument value or a bad file; the message is one line that names it.

    The command line turns exactly these (and ``OSError``) into one line on stderr and exit code 2.
    """
