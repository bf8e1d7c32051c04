import pytest
from tiny_cifar import make_tiny

from bnjax.data import cifar


@pytest.fixture
def tiny(monkeypatch):
    made = make_tiny(0)
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", made.version)
    return made
