"""The one error and the one warning that users meet."""


class UnmaskError(ValueError):
    """A user's mistake: what was asked, what was found, and what to do about it."""


class UnmaskWarning(UserWarning):
    """Something a user should know, that didn't stop the work: a skipped step, say."""
