"""Prints finished runs beside the tutorial's published results, as a Markdown table.

    python scripts/article_table.py RUN…

RUN is a run's folder, for instance runs/bn. A run stands beside the published column of its
config's name.
"""

import argparse
import json
from pathlib import Path

# Test accuracy and test loss after so many steps, one run each: the notebooks of
# github.com/ilango100/cifar (2018).
STEPS = (20, 40, 60, 80, 100, 200, 300, 400)
PUBLISHED = """
no_bn .402/1.64 .466/1.47 .540/1.28 .557/1.26 .596/1.14 .650/1.06 .621/1.45 .634/1.64
bn .510/1.38 .588/1.17 .602/1.19 .570/1.57 .581/1.71 - - -
bn_scale_shift .547/1.28 .595/1.17 .579/1.46 .568/1.78 .585/1.70 .604/1.75 .606/1.79 .607/1.83
bn_no_scale_shift .504/1.39 .580/1.18 .610/1.14 .579/1.54 .571/1.70 .604/1.77 .596/1.90 .608/1.90
dropout_bn .523/1.36 .592/1.18 .625/1.13 .615/1.26 .609/1.46 .617/1.83 .626/1.92 .630/1.98
dropout_bn_last .422/1.66 .522/1.34 .573/1.21 .603/1.13 .620/1.11 .631/1.48 .621/1.87 .629/2.13
"""


def main() -> None:
    """Reads the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    published = {name: cells for name, *cells in map(str.split, PUBLISHED.strip().splitlines())}
    columns = []
    for run in parser.parse_args().runs:
        name = json.loads((run / "config.json").read_text())["config"]["name"]
        label = json.loads((run / "config.json").read_text())["data"]["label"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tests = {
            line["step"]: f"{line['accuracy']:.3f}/{line['loss']:.2f}".lstrip("0")
            for line in lines
            if line["split"] == "test"
        }
        reached = next(
            (
                str(line["step"])
                for line in lines
                if line["split"] == "train" and line["loss"] <= 0.2
            ),
            "not reached",
        )
        if name in published:
            columns.append(
                (f"{name}, published", dict(zip(STEPS, published[name], strict=True)), "")
            )
        columns.append((f"{name} on {label}", tests, reached))
    print("| steps |" + "".join(f" {title} |" for title, *_ in columns))
    print("|---|" + "---|" * len(columns))
    for step in STEPS:
        if any(cells.get(step, "-") != "-" for _, cells, _ in columns):
            print(
                f"| {step} |"
                + "".join(
                    f" {cells.get(step, '-').replace('/', ' / ')} |" for _, cells, _ in columns
                )
            )
    print(
        "| training loss first at or below 0.2 |"
        + "".join(f" {reached} |" for *_, reached in columns)
    )


if __name__ == "__main__":
    main()
