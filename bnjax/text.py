"""Formats text and shows progress bars for the terminal."""

import sys
from collections.abc import Callable, Collection, Iterable, Sequence, Sized
from typing import Any

import tqdm


def text_table(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> str:
    """Returns rows as lines with aligned columns.

    Args:
        rows: the cells of each row; all rows have the same number of cells.
        right: the indices of the right-aligned columns.

    >>> print(text_table([["norm", "drift"], ["conv1", 0.5]], right=[1]))
    norm   drift
    conv1    0.5
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def progress(
    items: Iterable[Any], what: str, unit: str, total: int | None = None
) -> "tqdm.tqdm[Any]":
    """Returns an iterable over `items` that shows a progress bar with the remaining time.

    No bar is shown if standard error is not a terminal, or if there is only one item.

    Args:
        items: an iterable; pass an empty one to advance the bar with its method `update`.
        what: the text in front of the bar.
        unit: the name of a single item, for instance "image".
        total: the number of items; default: the length of `items`.
    """
    count = len(items) if total is None and isinstance(items, Sized) else total
    off = count == 1 or not sys.stderr.isatty()
    return tqdm.tqdm(items, what, total, False, unit=unit, dynamic_ncols=True, disable=off)


def counted(jit: Callable[..., Any], bar: "tqdm.tqdm[Any]") -> Callable[..., Any]:
    """Wraps `jit` so that each call of a compiled function advances a progress bar."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        run = jit(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            bar.update()
            return result

        return call

    return compiled
