"""How far a training is, on the terminal."""

import sys

import tqdm


class Progress:
    """A bar with the time to go on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int):
        """Starts at `done` of `total` steps."""
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def advance(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """Counts one training step."""
        words = f"loss {loss:.3f}, accuracy {accuracy:.3f}, {images_per_s:,.0f} images/s"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.tqdm.write(text)  # above other bars, too
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
