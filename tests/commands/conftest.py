"""Runs that several commands are tried on; each worker trains them once."""

import pytest
from digit_runs import train


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "healthy", momentum=0.5)


@pytest.fixture(scope="session")
def unready(tmp_path_factory):
    """The averages of this one still remember their initial values."""
    return train(tmp_path_factory.mktemp("runs") / "unready", momentum=0.99)
