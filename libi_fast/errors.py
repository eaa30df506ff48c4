"""The one exception for input a caller can mend, and the warnings."""


class InputError(ValueError):
    """Bad data, a bad argument value or a bad file; the message is one line that names it.

    The command line turns exactly these (and ``OSError``) into one line on stderr and exit code 2.
    """


class DivergenceWarning(UserWarning):
    """Markov chains had divergent transitions, or started where the density is not finite."""


class ParetoWarning(UserWarning):
    """The tail of importance weights is too heavy for some rows (Pareto k above 0.7): their estimates are unreliable."""
