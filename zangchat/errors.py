"""The one exception that a command turns into a single line for its user."""


class UserError(Exception):
    """A mistake of the user's: one sentence that names the flag or file, the problem and the next command."""
