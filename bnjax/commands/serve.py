"""`bnjax serve`: a page on this machine to try a network with images of one's own."""

import argparse
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnjax.commands.arguments import add_run_arguments
from bnjax.errors import UserError

GRACE = 5  # seconds that requests have to end after Ctrl-C


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "serve",
        "Try a trained network in the browser. A page on this machine scores images that are "
        "dropped on it, with stored, batch or no statistics in the batch norms, and shows what "
        "each norm was given; POST /predict does the same for programs.",
        "Whoever reaches the port can use it, and there is no password: leave --host as it is "
        "unless that is wanted.",
    )
    network = sub.add_mutually_exclusive_group(required=True)
    add_run_arguments(sub, data=False, among=network)
    network.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="the folder of an exported network, which has the stored statistics only",
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to listen at (default: 127.0.0.1, for this machine alone)",
    )
    sub.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="the port to listen at (default: 8000; 0 takes a free one)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves a network until Ctrl-C."""
    if args.model and args.checkpoint != "last":
        raise UserError(
            "--checkpoint is of a run: give its folder with --workdir. An exported network has one "
            "set of weights."
        )
    try:
        import python_multipart  # noqa: F401 Starlette reads forms with it
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"bnjax serve needs the package {error.name}: pip install 'bnjax[serve]'."
        ) from error
    from bnjax.export.app import application
    from bnjax.export.uploads import Limits
    from bnjax.train.cpu import prepare

    # Which character of a form is wrong is nothing that whoever runs the server can act on.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Before the network is loaded: so who cannot have the port hears it at once.
    with listen(args.host, args.port) as listener:
        prepare()
        host, port = listener.getsockname()[:2]
        app = application(_network(args), Limits(), names(host, args.host))
        print(
            f"{args.model or args.workdir} is served at "
            f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)",
            flush=True,
        )
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises once it has ended
            uvicorn.Server(config).run(sockets=[listener])
    print("\nended")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address.

    Raises:
        UserError: if the port is taken, or the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"bnjax serve cannot listen at {host}, port {port}: {reason}. Choose a port that is "
            "free with --port, 0 for any; --host has to be an address of this machine."
        ) from error


def names(address: str, host: str) -> list[str] | None:
    """Returns by which names a server may be asked that listens at an address, or None for any.

    Who listens at the loopback address is for this machine alone. Elsewhere any machine can ask,
    by names that are not known here.
    """
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return [*dict.fromkeys([address, host.lower(), "localhost"])]


def _network(args: argparse.Namespace) -> Any:
    from bnjax.export.network import ExportedNetwork, RunNetwork

    if args.model:
        from bnjax.export.exported import Exported

        return ExportedNetwork(Exported(args.model))
    from bnjax.train.trained import Trained

    return RunNetwork(Trained(args.workdir, args.checkpoint))


def _port(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)
