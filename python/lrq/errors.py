"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input: the message is one line that says what, where and what to do."""


def printable(name: str) -> str:
    """``name`` with control characters escaped, so that a file's own words can't steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)
