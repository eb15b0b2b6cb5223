"""The one error a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one sentence that says what was wrong, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2; in Python it is a ``ValueError``.
    """
