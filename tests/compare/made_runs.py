"""Folders of runs that nobody trained, so that every number in them is known."""

import json

import numpy as np
import synthetic

from bnjax.train import diagnostics

RNG = np.random.default_rng(0)
LOSSES = (2.0, 1.0, 0.5, 0.25, 0.125)


def write_run(
    folder, seed=0, *, name="bn", losses=LOSSES, finished=True, inside=True, config=None, **changes
):
    """Makes a run of a step for each loss.

    It is evaluated after every second step, with a test loss 0.1 above the training loss and an
    accuracy of 0.5 + seed / 100 + step / 1000.
    """
    config = config or synthetic.config(steps=len(losses))
    config.name, config.seed = name, seed
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    folder.mkdir(parents=True)
    data = {"name": "synthetic", "label": "the digits"}
    data |= {"image_shape": [8, 8, 1], "classes": ["a", "b"]}
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict(), "data": data}))
    lines = {"metrics": [], "timing": [], "histograms": []}
    for step, loss in enumerate(losses, start=1):
        train = {"step": step, "split": "train", "loss": loss, "accuracy": 1 - loss / 4}
        lines["metrics"].append(train)
        lines["timing"].append({"step": step, "seconds": 3.0 + 2.0 * step, "images_per_s": 5.0})
        if step % 2 == 0:
            accuracy = 0.5 + seed / 100 + step / 1000
            test = {"step": step, "split": "test", "loss": loss + 0.1, "accuracy": accuracy}
            lines["metrics"].append(test | {"count": 20})
            kinds = {
                "statistic": {"norm.mean": RNG.normal(size=9), "norm.var": RNG.uniform(size=9)},
                "activation": {"conv": RNG.normal(size=99)},
                "gradient": {"conv.kernel": RNG.normal(size=50)},
            }
            if inside:
                lines["histograms"].append({"step": step, **diagnostics.summarise(kinds)})
    for file, content in lines.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    if finished:
        summary = {"official_pixels": False, "fallback_reason": "", "steps": len(losses)}
        summary |= {"device": "1 x abacus", "git": "abc1234", "versions": {"python": "3.11"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def statement(**changes):
    """Returns the fields of a claim: the accuracy of a is above that of b by 0.02."""
    fields = {"quantity": "test_accuracy", "at": "last", "of": "a", "against": "b"}
    return fields | {"direction": "greater", "margin": 0.02, "source": "me"} | changes


def comparison(names, *statements, seeds=3, needed=3, **changes):
    """Returns what comparison.json holds."""
    variant = {"config": {"train": {"target_loss": 0.5}}, "dataset": "made up"}
    return {
        "question": "Is a better?",
        "size": "small",
        "command": "bnjax compare",
        "variants": dict.fromkeys(names, variant),
        "statements": list(statements),
        "seeds": list(range(seeds)),
        "seeds_needed": needed,
        **changes,
    }
