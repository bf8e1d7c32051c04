"""Progress bars: for long work in a terminal, and nowhere else."""

import io
import sys

import pytest

from bnjax.text import counted, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "items", "is_shown"),
    [(Terminal, range(3), True), (Terminal, range(1), False), (io.StringIO, range(3), False)],
)
def test_a_bar_is_shown_in_a_terminal_for_several_items(monkeypatch, stream, items, is_shown):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress(items, "images", "image")) == list(items)
    assert ("images:   0%" in sys.stderr.getvalue()) == is_shown


def test_calls_advance_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress((), "audit", "batch", total=4) as bar:
        double = counted(lambda function: function, bar)(lambda x, *, plus: 2 * x + plus)
        assert [double(1, plus=0), double(2, plus=1)] == [2, 5]
        assert bar.n == 2


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("audit",), "audit:"),
        (("precise", "--images", "512", "--by", "population"), "statistics:"),
        (("fold",), "logits:"),
        (("predict", "--split", "train"), "logits:"),
    ],
)
def test_commands_show_their_progress(bnjax, unready, monkeypatch, words, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bnjax(*words, "--workdir", unready)
    assert f"{shown}   0%" in sys.stderr.getvalue()
