"""Drops log messages from other libraries that a user of bnjax can do nothing about."""

import functools
import logging
from pathlib import Path

import absl.logging


@functools.cache
def drop_logs(package: str, below: int = logging.ERROR) -> None:
    """Drops the absl log messages of a package whose level is below `below`."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= below or package not in Path(record.pathname).parts

    absl.logging.get_absl_logger().addFilter(wanted)
