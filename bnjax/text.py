"""Formats text for the terminal."""

from collections.abc import Collection, Sequence


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
