import pytest

from bnjax import errors, main


@pytest.fixture
def bnjax(capsys):
    """Runs a command; returns exit code, standard output and standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            errors.run(lambda: main.main([*map(str, arguments)]))
        return left.value.code or 0, *capsys.readouterr()

    return call
