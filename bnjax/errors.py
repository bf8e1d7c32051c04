"""Errors that a user can mend, and how the command lines report them."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

# What JAX says where a process of a training has gone that others wait for.
LOST_PROCESS = ("Gloo", "coordination service", "heartbeat", "NCCL", "CoordinationService")


class UserError(Exception):
    """What went wrong, why, and how to mend it, in one paragraph; shown without a traceback.

    Attributes:
        exit_code: of the command line: 2 for what was asked wrongly, 1 for what went wrong.
    """

    exit_code = 2


class ConfigError(UserError):
    """A key of the config is unknown or its value impossible."""

    def __init__(self, key: str, value: object, allowed: str):
        """Names the key below `config.`, the value that was given and what is allowed."""
        super().__init__(f"config.{key} = {value!r} is not possible. Allowed: {allowed}.")


class DataError(UserError):
    """Images or labels are missing, damaged or unreachable."""


class NonFiniteError(UserError):
    """Training met numbers that are infinite or not numbers at all."""

    exit_code = 1


class WorkerError(UserError):
    """Processes that read images ahead were lost, again and again."""

    exit_code = 1


class UnavailableError(DataError):
    """There is no copy of the data here and none can be fetched; other data may stand in."""


def brief(error: BaseException) -> str:
    """Returns why something failed, on one line and at most 200 characters, without a full stop."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return text.rstrip(".") or type(error).__name__


def run(main: Callable[[], int]) -> None:
    """Runs a command line and exits with its code, or with that of the error that it met.

    130 after Ctrl-C.
    """
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_send_again, before)
    try:
        sys.exit(_code_of(main))
    finally:
        sys.unraisablehook = before


def _code_of(main: Callable[[], int]) -> int:
    """Returns the exit code of a command line, and says what went wrong."""
    code = 1
    try:
        return main()
    except UserError as error:
        said, code = str(error), error.exit_code
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        said = f"{error.filename or 'a file'} cannot be read or written: {brief(error)}."
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _leave(130)  # XLA may be compiling in threads that do not survive the way out
    except Exception as error:
        # By its text: only XLA raises it, and nothing here should import JAX just for --help.
        if any(words in str(error) for words in LOST_PROCESS):
            print(
                "error: another process of this training has ended or cannot be reached "
                f"({brief(error)}). Up to the last checkpoint everything is saved: start all "
                "processes again with the same command, and they go on from it.",
                file=sys.stderr,
            )
            _leave(1)  # the way out waits for the lost one
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (
            f"the memory of this machine does not suffice ({brief(error)}). What helps: a smaller "
            "--config.train.batch_size or --config.eval.batch_size, smaller layers "
            "(--config.model.filters, --config.model.dense), and --at-once=one where several seeds "
            "are compared."
        )
    print(f"error: {said}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    """Ends this process at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a pipe's reader may be gone
            stream.flush()
    os._exit(code)


def _send_again(otherwise: Callable[[Any], None], raised: Any) -> None:
    """Sends Ctrl-C once more where it came while nothing could be raised.

    JAX has the garbage collector call it, for instance, while it is imported and compiles.
    """
    if issubclass(raised.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        otherwise(raised)
