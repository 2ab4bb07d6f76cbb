"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake the user can fix, said in one sentence: what was got, what is needed, what to type.

    ``python -m sslzoo`` prints it as one line and leaves with exit code 2, without a traceback.
    """
