"""Errors that a user can mend, and how the command lines report them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What went wrong, why, and how to mend it, in one paragraph; shown without a traceback."""


class ConfigError(UserError):
    """A key of the config is unknown or its value impossible."""

    def __init__(self, key: str, value: object, allowed: str):
        """Names the key below `config.`, the value that was given and what is allowed."""
        super().__init__(f"config.{key} = {value!r} is not possible. Allowed: {allowed}.")


class DataError(UserError):
    """Images or labels are missing, damaged or unreachable."""


class UnavailableError(DataError):
    """There is no copy of the data here and none can be fetched; other data may stand in."""


def run(main: Callable[[], int]) -> None:
    """Runs a command line and exits with its code: 2 after a `UserError`, 130 after Ctrl-C."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        sys.stderr.close()
        code = 0
    sys.exit(code)
