"""What other libraries log and no user of bnjax can act on."""

import functools
import logging
from pathlib import Path

import absl.logging


@functools.cache
def drop_logs(package: str, below: int = logging.ERROR) -> None:
    """Drops what a package logs through absl below a level; what others log stays as it is."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= below or package not in Path(record.pathname).parts

    absl.logging.get_absl_logger().addFilter(wanted)
