"""Makes the pictures in the documentation, from networks that it trains for a few seconds.

    python scripts/pictures.py                       # all pictures, into docs/pictures
    python scripts/pictures.py batch.svg lag.svg     # only these
    python scripts/pictures.py --data FOLDER         # with CIFAR-10 instead of the embedded digits

    audit.svg          what `bnjax audit` prints about a network with averages that lag
    badges.svg         the version, the oldest Python and the licence, for the README
    batch.svg          the path of a batch; fails if a function in it does not exist
    curves.png         the figure of `bnjax report runs/bn runs/no_bn`
    findings.png       the findings in a notebook
    lag.svg            running averages and the batch statistics that they follow
    page.png           the page of `bnjax serve`
    report.png         the page that `bnjax report` writes
    steps_to_loss.png  the figure of `bnjax report runs/five_times`
    tensorboard.png    TensorBoard

Four pictures are screenshots, which need `pip install playwright tensorboard` and Chromium (or
`playwright install chromium`). The pictures curves.png and steps_to_loss.png need the runs
`runs/bn`, `runs/no_bn` and `runs/five_times` (see docs/results.md); --runs is the folder that has
them. If something is missing, the old picture is kept. Takes one to two minutes on two cores.
"""

import argparse
import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drawing
import lag
import numpy as np
from PIL import Image

from bnjax import errors, main
from bnjax.train.cpu import prepare

OUT = Path(__file__).parents[1] / "docs/pictures"
SMALL = {"model.filters": "8,16,16", "model.dense": "64,32", "train.epochs": 0, "train.steps": 100}
SMALL |= {"eval.every_epochs": 0, "eval.every_steps": 10}
WAIT = 8000  # milliseconds, until a page has drawn its charts
TAGS = "test/accuracy|drift_mean/dense1|statistic/dense1_norm.mean"
SLOW, FAST = Path("runs/momentum99"), Path("runs/momentum90")


class Missing(Exception):
    """Something that a picture needs is not there."""


class Maker:
    """Makes pictures in the current folder, from runs that are trained when first needed."""

    def __init__(self, data: Path | None, runs: Path):
        """Trains nothing yet."""
        found = {"data.name": "cifar10", "data.dir": data} if data else {}
        self.words = [f"--config.{key}={value}" for key, value in (SMALL | found).items()]
        self._folder = runs

    @functools.cached_property
    def runs(self) -> tuple[Path, Path]:
        """The folders of two runs that differ in momentum."""
        for workdir, momentum in ((SLOW, 0.99), (FAST, 0.9)):
            words = ["--config", "digits", "--workdir", str(workdir), *self.words]
            bnjax(*words, f"--config.name={workdir.name}", f"--config.model.momentum={momentum}")
        return SLOW, FAST

    @functools.cached_property
    def printed(self) -> str:
        """The output of `bnjax audit`, which also writes audit.html."""
        return bnjax("audit", "--workdir", str(self.runs[0]), "--out", ".")

    def audit(self) -> bytes:
        """Returns the output of `bnjax audit` in a terminal."""
        from rich.console import Console
        from rich.text import Text

        console = Console(record=True, width=104, file=io.StringIO(), color_system=None)
        console.print(Text(f"$ bnjax audit --workdir {self.runs[0]}\n", "bold"))
        console.print(Text(self.printed.rstrip()))
        svg = console.export_svg(title="bnjax audit", unique_id="audit")
        # Pictures in a page load no fonts.
        return re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL).encode()

    def findings(self) -> bytes:
        """Returns the findings as a notebook shows them."""
        assert self.printed
        with browser(940, 400) as page:
            page.goto(Path("audit.html").resolve().as_uri())
            page.add_style_tag(content="h1 { display: none } body { padding: 0 1rem }")
            return small(page.screenshot(full_page=True))

    def report(self) -> bytes:
        """Returns the first part of the page that `bnjax report` writes."""
        bnjax("report", *map(str, self.runs), "--out", "runs")
        with browser(1080, 1000) as page:
            page.goto(Path("runs/report.html").resolve().as_uri())
            page.wait_for_selector(".chart svg, .chart canvas")
            end = page.locator("h2").nth(2).bounding_box()["y"]
            clip = {"x": 0, "y": 0, "width": 1080, "height": end}
            return small(page.screenshot(full_page=True, clip=clip))

    def tensorboard(self) -> bytes:
        """Returns TensorBoard with curves and histograms of both runs."""
        assert self.runs
        words = ["--logdir", "runs", "--port", "0", "--reload_interval", "0"]
        if not (program := Path(sys.executable).with_name("tensorboard")).exists():
            raise Missing("pip install tensorboard")
        pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with browser(1080, 980) as page, subprocess.Popen([program, *words], **pipe) as server:
            try:
                line = next(line for line in server.stdout or () if "CTRL+C" in line)
                address = line.split(" at ")[1].split()[0]
                page.goto(f"{address}?tagFilter={TAGS}&smoothing=0#timeseries")
                page.click("text=Enable step selection")  # its table has times
                page.click("[aria-label='Close side pane']")
                page.wait_for_timeout(WAIT)
                return small(page.screenshot())
            finally:
                server.terminate()

    def page(self) -> bytes:
        """Returns the page of `bnjax serve` after an upload of images."""
        from bnjax.export import page as pages
        from bnjax.train.trained import Trained

        trained = Trained(self.runs[0], "last")
        split, files = trained.dataset(None).test, []
        for label, name in enumerate(trained.data.classes[:4]):
            files.append(f"{name}.png")
            Image.fromarray(split.image[np.argmax(split.label == label)]).save(files[-1])
        demo = pages.page(pages.Scores(trained))
        address = pages.launch(demo, "127.0.0.1", None)
        try:
            with browser(940, 900) as page:
                page.goto(address)
                page.set_input_files("input[type=file]", files)
                page.wait_for_timeout(WAIT)
                return small(page.screenshot(full_page=True))
        finally:
            demo.close()

    def curves(self) -> bytes:
        """Returns loss and accuracy of the tutorial's network with and without BN."""
        return self._figure("curves", "bn", "no_bn")

    def steps_to_loss(self) -> bytes:
        """Returns the steps to a training loss of 0.2 for several seeds."""
        return self._figure("steps_to_loss", "five_times")

    def _figure(self, name: str, *runs: str) -> bytes:
        folders = [self._folder / run for run in runs]
        if missing := [str(folder) for folder in folders if not folder.exists()]:
            raise Missing(f"there is no {' or '.join(missing)}; docs/results.md has the commands")
        bnjax("report", *map(str, folders), "--out", name)
        return Path(name, "report_files", f"{name}.png").read_bytes()


PICTURES: dict[str, Callable[[Maker], bytes]] = {
    "audit.svg": Maker.audit,
    "badges.svg": lambda _: drawing.badges().encode(),
    "batch.svg": lambda _: drawing.batch().encode(),
    "curves.png": Maker.curves,
    "findings.png": Maker.findings,
    "lag.svg": lambda maker: lag.lag(maker.words),
    "page.png": Maker.page,
    "report.png": Maker.report,
    "steps_to_loss.png": Maker.steps_to_loss,
    "tensorboard.png": Maker.tensorboard,
}


def bnjax(*words: str) -> str:
    """Runs a command of bnjax and returns its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.main(words)
    return out.getvalue()


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """Opens a page in Chromium."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError as error:
        raise Missing("pip install playwright") from error
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        except Error as error:
            raise Missing("playwright install chromium") from error
        size: Any = {"width": width, "height": height}
        yield chromium.new_page(viewport=size, device_scale_factor=1.5)
        chromium.close()


def small(png: bytes) -> bytes:
    """Returns a PNG with 128 colours, as small as those of a report."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def command() -> int:
    """Makes the pictures named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all pictures")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"default: {OUT}")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR")
    args = parser.parse_args()
    if unknown := {*args.names} - {*PICTURES}:
        known = ", ".join(PICTURES)
        raise errors.UserError(f"there is no picture {', '.join(unknown)}. Choose from {known}.")
    prepare(training=True)
    out, data = args.out.resolve(), args.data and args.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    maker = Maker(data, args.runs.resolve())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in args.names or PICTURES:
            try:
                (out / name).write_bytes(PICTURES[name](maker))
                print(f"written: {out / name}")
            except Missing as missing:
                print(f"skipped: {name} ({missing})")
    return 0


if __name__ == "__main__":
    errors.run(command)
