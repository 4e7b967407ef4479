"""The error for what a user can fix."""

from __future__ import annotations


class PhotonError(ValueError):
    """Bad input: the message is one line that names the file or key and the fix.

    Recipes print it without a traceback and exit with status 2.
    """


def printable(text: object) -> str:
    """`text`, such as a file's name, as one line that any stream takes: other characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
