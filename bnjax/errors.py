"""Errors that a user can fix, and their output on the command line."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Words that occur in JAX's errors when distributed training loses a process.
LOST_PROCESS = ("Gloo", "coordination service", "heartbeat", "NCCL", "CoordinationService")


class UserError(Exception):
    """An error whose message gives the cause and the fix; it is shown without a traceback.

    Attributes:
        exit_code: the exit code of the command: 2 for invalid input, 1 for a failure.
    """

    exit_code = 2


class ConfigError(UserError):
    """A config key is unknown or its value is invalid."""

    def __init__(self, key: str, value: object, allowed: str):
        """Builds the message from a key without `config.`, its value and its allowed values."""
        super().__init__(f"config.{key} = {value!r} is invalid. Allowed: {allowed}.")


class DataError(UserError):
    """Images or labels are missing, damaged or unreachable."""


class NonFiniteError(UserError):
    """Training produced infinities or NaN."""

    exit_code = 1


class WorkerError(UserError):
    """A data loading process died."""

    exit_code = 1


class UnavailableError(DataError):
    """The data are not on this machine and cannot be downloaded; the caller may use other data."""


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Turns a failed import into a `UserError` that names the extra of bnjax to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the package {error.name}, which is not installed. Install it with: "
            f"pip install 'bnjax[{extra}]'."
        ) from error


def brief(error: BaseException) -> str:
    """Returns the text of an error on one line of at most 200 characters, without a full stop."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return text.rstrip(".") or type(error).__name__


def run(main: Callable[[], int]) -> None:
    """Runs a command and exits with its exit code, the code of its error, or 130 after Ctrl-C."""
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_send_again, before)
    try:
        sys.exit(_code_of(main))
    finally:
        sys.unraisablehook = before


def _code_of(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit code; prints any error."""
    code = 1
    try:
        return main()
    except UserError as error:
        said, code = str(error), error.exit_code
    except BrokenPipeError:  # the reader of the pipe has exited, for instance `head`
        sys.stderr.close()
        return 0
    except OSError as error:
        said = f"{error.filename or 'a file'} cannot be read or written: {brief(error)}."
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _leave(130)  # XLA's compilation threads would crash in a normal exit
    except Exception as error:
        if isinstance(error, ImportError) and isinstance(error.__context__, KeyboardInterrupt):
            _leave(130)  # Ctrl-C during the import of an extension module
        # The error is recognised by its text, because its type would need an import of JAX.
        if any(words in str(error) for words in LOST_PROCESS):
            print(
                "error: another process of this training run has ended or cannot be reached "
                f"({brief(error)}). The last checkpoint is saved: start all processes again with "
                "the same command to resume from it.",
                file=sys.stderr,
            )
            _leave(1)  # a normal exit would wait for the lost process
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (
            f"out of memory ({brief(error)}). Use a smaller --config.train.batch_size or "
            "--config.eval.batch_size, smaller layers (--config.model.filters, "
            "--config.model.dense), or --at-once=one in a comparison of several seeds."
        )
    print(f"error: {said}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    """Ends this process immediately."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of the pipe may have exited
            stream.flush()
    os._exit(code)


def _send_again(otherwise: Callable[[Any], None], raised: Any) -> None:
    """Sends SIGINT again if a KeyboardInterrupt was raised where Python ignores exceptions.

    This happens in JAX's garbage collection callbacks while a module is imported or a program is
    compiled.
    """
    if issubclass(raised.exc_type, KeyboardInterrupt):
        if sys.platform == "win32":
            timer = threading.Timer(0.02, signal.raise_signal, (signal.SIGINT,))
        else:
            main = threading.main_thread().ident
            timer = threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
    else:
        otherwise(raised)
