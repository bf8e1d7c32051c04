"""Drops log messages of other libraries on which a user of bnjax cannot act."""

import functools
import logging
from pathlib import Path

import absl.logging


@functools.cache
def drop_logs(package: str, below: int = logging.ERROR) -> None:
    """Drops all absl log messages of a package below a level."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= below or package not in Path(record.pathname).parts

    absl.logging.get_absl_logger().addFilter(wanted)
