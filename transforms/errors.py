"""The user's mistakes, told in one line."""


class UserError(Exception):
    """What the user can mend: the message is one line that says what, where, the value and the fix. Exit code 2."""


class DataRefused(Exception):
    """The data was refused as a whole: conservation violated, too many rejected rows, parity broken. Exit code 3."""
