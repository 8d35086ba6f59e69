"""The one exception type whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: a missing file, a bad setting, too little text.

    The message is one clear line that says what went wrong and what to do about it. The command line prints that
    line and exits with code 2; any other exception is a bug and keeps its traceback.
    """
