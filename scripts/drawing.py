"""Draws the path of a batch through the code, and badges, for `scripts/pictures.py`."""

import html
import pkgutil
import tomllib
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


class Box(NamedTuple):
    """A function at a column and a row of the drawing, or parameters of a function (`owner`)."""

    column: int
    row: int
    module: str
    name: str
    text: tuple[str, str]
    owner: str = ""


BOXES = [
    Box(0, 0, "data.feed", "Feed.items", ("images or indices", "for one step")),
    Box(2, 0, "train.run", "Run.log", ("writes metrics while", "the device computes")),
    Box(3, 0, "train.run", "Run.save", ("writes a checkpoint", "when it is due")),
    Box(4, 0, "train.run", "Run.test", ("writes loss and", "accuracy")),
    Box(0, 1, "data.feed", "Feed.batch", ("looks up images that", "stay on the device")),
    Box(1, 1, "train.steps", "training_batch", ("augments", "the images")),
    Box(2, 1, "train_step", "train_step", ("loss, gradient,", "update")),
    Box(3, 1, "train.steps", "Steps.evaluated", ("averaged weights,", "precise statistics")),
    Box(4, 1, "train_step", "eval_step", ("normalises by the", "running statistics")),
    Box(1, 2, "train_step", "init_state", ("for a new run, else", "the last checkpoint")),
    Box(
        2,
        2,
        "train_step",
        "state, batch_stats",
        ("go into each step", "and come out"),
        "train_step",
    ),
]
ARROWS = [  # from, to, label, pixels from the middle of the box
    ("Feed.items", "Feed.batch", "items", 0),
    ("Feed.batch", "training_batch", "", 0),
    ("training_batch", "train_step", "", 0),
    ("train_step", "Run.log", "metrics", 0),
    ("init_state", "state, batch_stats", "", 0),
    ("state, batch_stats", "train_step", "", -30),
    ("train_step", "state, batch_stats", "", 30),
    ("state, batch_stats", "Steps.evaluated", "", 0),
    ("Steps.evaluated", "Run.save", "weights, statistics", 0),
    ("Steps.evaluated", "eval_step", "", 0),
    ("eval_step", "Run.test", "metrics", 0),
]
WIDTH, HEIGHT, PITCH, TOPS = 172, 92, 196, (50, 258, 396)  # of the boxes, in pixels
START = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1004 514" role="img">
<title>The path of a batch</title>
<style>
text { font: 14px system-ui, sans-serif; fill: #1c1c1e }
.lane { font-weight: bold; font-size: 16px }
.name { font: bold 14px ui-monospace, monospace }
.file { font: 12px ui-monospace, monospace; fill: #5c5c63 }
rect { fill: #f3f4f6 }
.page, .box { fill: #ffffff }
.box { stroke: #7d8590 }
.value { fill: #fdebdc; stroke: #d55e00 }
path, .program { fill: none; stroke: #2a78b5; stroke-width: 2 }
.program { stroke-width: 1; stroke-dasharray: 5 4 }
marker path { fill: #2a78b5; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #ececef }
  .file { fill: #a6a6ae }
  rect { fill: #1f2328 }
  .page { fill: #141416 }
  .box { fill: #2b3038 }
  .value { fill: #4a2c14 }
  .program { fill: none }
  path, .program { stroke: #6cb0e6 }
  marker path { fill: #6cb0e6; stroke: none }
}
</style>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5"
  orient="auto"><path d="M0 0L8 4L0 8z"/></marker>
<rect class="page" width="1004" height="514"/>
<rect x="8" y="8" width="988" height="148" rx="10"/>
<rect x="8" y="194" width="988" height="312" rx="10"/>
<rect class="program" x="16" y="228" width="580" height="130" rx="8"/>
<text class="lane" x="24" y="34">Host</text>
<text class="lane" x="24" y="218">Device</text>
<text class="file" x="220" y="247">training_program</text>"""


def batch() -> str:
    """Returns the path of a batch as an SVG with light and dark colours.

    Raises:
        AttributeError: if a function or parameter in the drawing does not exist.
    """
    parts, places = [START], {}
    pkgutil.resolve_name("bnjax.train.steps:training_program")
    for box in BOXES:
        check(box)
        x, y = places[box.name] = 24 + PITCH * box.column, TOPS[box.row]
        kind, file = "value" if box.owner else "box", f"{box.module.replace('.', '/')}.py"
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        )
        for style, line, down in (
            ("name", box.name, 22),
            ("text", box.text[0], 43),
            ("text", box.text[1], 61),
            ("file", file, 81),
        ):
            parts.append(f'<text class="{style}" x="{x + 10}" y="{y + down}">{line}</text>')
    for start, end, label, shift in ARROWS:
        (x, y), (to_x, to_y) = places[start], places[end]
        across = to_x + WIDTH // 2 + shift
        if y == to_y:
            line = f"M{x + WIDTH} {y + HEIGHT // 2}H{to_x}"
        elif x == to_x:
            ends = (y, to_y + HEIGHT) if to_y < y else (y + HEIGHT, to_y)
            line = f"M{across} {ends[0]}V{ends[1]}"
        else:
            line = f"M{x + WIDTH} {y + HEIGHT // 2}H{across}V{to_y + HEIGHT}"
        parts.append(f'<path d="{line}" marker-end="url(#head)"/>')
        if label:
            parts.append(f'<text x="{across + 8}" y="180">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def check(box: Box) -> None:
    """Raises AttributeError if a function or parameter in a box does not exist."""
    module = f"bnjax.{box.module}"
    for name in box.name.split(", "):
        owner, _, leaf = f"{box.owner}.{name}".strip(".").rpartition(".")
        there = pkgutil.resolve_name(f"{module}:{owner}")
        # The fields of a dataclass and the parameters of a function are annotations.
        if not hasattr(there, leaf) and leaf not in there.__annotations__:
            raise AttributeError(f"{module} has no {f'{owner}.{leaf}'.strip('.')}")


def badges() -> str:
    """Returns an SVG with the version, the oldest Python and the licence, from pyproject.toml."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    python = project["requires-python"].replace(">=", "") + " or newer"
    texts = (
        (project["name"], project["version"]),
        ("Python", python),
        ("licence", project["license"]),
    )
    parts, x = [], 0
    for pair in texts:
        for text, colour in zip(pair, ("#555", "#07b"), strict=True):
            width = 10 + 7 * len(text)
            parts += [
                f'<rect x="{x}" width="{width}" height="20" fill="{colour}"/>',
                f'<text x="{x + width / 2:g}" y="14" textLength="{width - 10}" fill="#fff" '
                f'text-anchor="middle">{html.escape(text)}</text>',
            ]
            x += width
        x += 8
    label = html.escape(", ".join(" ".join(pair) for pair in texts))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - 8}" height="20" role="img" '
    style = 'font-family="Verdana, sans-serif" font-size="11"'
    return "\n".join([f'{head}aria-label="{label}" {style}>', *parts, "</svg>\n"])
