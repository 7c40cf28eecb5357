"""The one error that ends a command with a clear line and exit status 2."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message names what was found and what was expected."""
