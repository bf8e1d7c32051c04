"""Prints the findings of the audit, or of another tool, in the networks of tests/zoo.

    python scripts/zoo.py
    python scripts/zoo.py --library torch --tool torch-audit

Prints, for each case and library, the fault of the network, the findings for the network, the
findings for its healthy twin, and the seconds for both. Then prints recall and false alarms,
separately for the cases that were held out before any limit was tuned. bnjax must name the fault.
Other tools are for torch and have other names for faults, so a fault counts as found if the tool
reports something for the faulty network that it does not report for the twin. Install these tools
in a separate environment.
"""

import argparse
import collections
import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tqdm
from zoo import LIBRARIES, cases, kit, variants

from bnjax.text import text_table

MODULES = {"linen": "flax", "nnx": "flax"}


def optimizer_of(patient):
    """Returns the optimizer at the start of the training, or one of the averaged weights."""
    from zoo import kit_torch

    optimizer, own = patient.run.tx, {id(leaf) for leaf in patient.network.parameters()}
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
        if any(id(leaf) not in own for leaf in group["params"]):
            return kit_torch.sgd(patient.network)
    return optimizer


def torch_audit(patient):
    """Returns the rules about which the tool warns in three steps of the training loop."""
    from torch_audit import Severity, autopatch

    model, optimizer = patient.network, optimizer_of(patient)
    auditor = autopatch(model, optimizer=optimizer, every_n_steps=1, reporters=[])
    for batch in patient.batches[:3]:
        patient.run.step(model, batch, optimizer)
    found = auditor.finish(report=False).findings
    auditor.unpatch()
    return {one.rule_id for one in found if one.severity != Severity.INFO}


def torchtest2(patient):
    """Returns the checks that warn or fail, with a batch and the optimizer of the training."""
    from torch.nn.functional import cross_entropy
    from torchtest2 import Status, check_model
    from zoo import kit_torch

    model, batch = patient.network, patient.batches[0]
    results = check_model(
        model,
        kit_torch.images(batch),
        kit_torch.labels(batch),
        loss_fn=cross_entropy,
        optimizer=optimizer_of(patient),
        frozen=patient.run.frozen,
        skip=("initial_loss",),  # it is for untrained networks
    ).results
    return {one.name for one in results if one.status in (Status.WARN, Status.FAIL)}


def pytest_torch(patient):
    """Returns the assertions about inference, gradients and frozen layers that fail."""
    import pytest_torch as tool
    from torch.nn.functional import cross_entropy
    from zoo import kit_torch

    model, batch = patient.network, patient.batches[0]
    images, labels = kit_torch.images(batch), kit_torch.labels(batch)
    contract = tool.check_inference_contract(model, images, raise_on_failure=False)
    found = {one.name for one in contract.failures}
    frozen = [f"{name}.*" for name in patient.run.frozen]
    checks = {"assert_gradients_finite": (), "assert_all_params_receive_grad": ()}
    checks |= {"assert_frozen": (frozen,)} if frozen else {}
    for name, arguments in checks.items():
        try:
            getattr(tool, name)(model, images, lambda out: cross_entropy(out, labels), *arguments)
        except AssertionError:
            found.add(name)
    return found


TOOLS = {"torch-audit": torch_audit, "torchtest2": torchtest2, "pytest-torch": pytest_torch}


def main():
    """Runs a tool on every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: all")
    parser.add_argument("--tool", choices=TOOLS, help="default: bnjax")
    options = parser.parse_args()
    libraries, tool = options.library or LIBRARIES, kit.ids
    if options.tool:
        libraries, tool = ["torch"], TOOLS[options.tool]
        if not importlib.util.find_spec(options.tool.replace("-", "_")):
            sys.exit(f"{options.tool} is not installed: pip install {options.tool}")
    missing = {one for one in libraries if not importlib.util.find_spec(MODULES.get(one, one))}
    rows = [("case", "library", "has", "found", "in its twin", "seconds")]
    counts = collections.defaultdict(collections.Counter)
    chosen = [one for one in variants() if one[1] in {*libraries} - missing]
    for name, library in tqdm.tqdm(chosen, disable=None):
        case, start = cases()[name], time.perf_counter()
        found, false = ({*tool(case.patient(library, sick))} for sick in (True, False))
        is_found = bool(found - false) if options.tool else case.finds in found
        aside = "set aside" if case.aside else "tuned"
        for group in (f"{library}, {aside}", f"all, {aside}"):
            counts[group] += {"cases": 1, "found": is_found, "twins": bool(false)}
        seconds = f"{time.perf_counter() - start:.1f}"
        mark = "*" * case.aside
        texts = [", ".join(sorted(ids)) for ids in (found, false)]
        rows.append((name + mark, library, case.finds, *texts, seconds))
    print(text_table(rows))
    print("* set aside before any limit was tuned\n")
    alarms = "twins with a warning" if options.tool else "false alarms"
    sums = [
        (group, *(of[name] for name in ("cases", "found", "twins")))
        for group, of in sorted(counts.items())
    ]
    print(text_table([("", "cases", "found", alarms), *sums]))
    for library in missing:
        print(f"{library} is not installed")


if __name__ == "__main__":
    main()
