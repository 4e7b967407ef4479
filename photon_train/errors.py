"""The error for what a user can fix."""

from __future__ import annotations


class PhotonError(ValueError):
    """Bad input: the message is one line that names the file or key and the fix.

    Recipes print it without a traceback and exit with status 2.
    """
