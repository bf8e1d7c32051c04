"""Exported models, run as the documentation shows, in processes that know nothing of bnjax."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
WITH_JAX, WITHOUT_JAX = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
)
# Runs a script for each folder and file of images; leaves its logits beside the images.
RUNNER = """
import contextlib, io, json, runpy, sys
import numpy as np
script, banned, jobs = sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3])
for folder, images, out in jobs:
    sys.argv = [script, folder, images]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        logits = np.asarray(runpy.run_path(script)["logits"])
    np.savez(out, logits=logits, printed=printed.getvalue())
print([name for name in banned if name in sys.modules])
"""


def run(script, banned, jobs, tmp_path):
    """Returns logits, and what was printed, for each of `jobs` (folder, images), from one process.

    `banned` are the modules that it must not have imported in the end.
    """
    (tmp_path / "script.py").write_text(script)
    tasks = []
    for number, (folder, images) in enumerate(jobs):
        np.save(tmp_path / f"{number}.npy", images)
        tasks.append([str(folder), str(tmp_path / f"{number}.npy"), str(tmp_path / f"{number}")])
    # Where it starts there is no bnjax; it may be installed, and must not be used.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", RUNNER, tmp_path / "script.py", banned, json.dumps(tasks)]
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"  # none of the banned modules
    found = [np.load(f"{out}.npz") for _, _, out in tasks]
    return [(one["logits"], str(one["printed"])) for one in found]
