"""`bnjax info`: prints the information that a bug report should include."""

import importlib.util
import json as json_
import os
import platform
from typing import Any

from bnjax.commands import Json

# Maps each extra to a module that it installs.
EXTRAS = {
    "stream": "grain",
    "report": "altair",
    "onnx": "onnxruntime",
    "serve": "gradio",
    "equinox": "equinox",
}


def run(json: Json = False) -> int:
    """Print versions, devices, the folder for downloads and the installed extras."""
    import jax

    from bnjax.data.datasets import cache_dir
    from bnjax.train.cpu import processor
    from bnjax.train.summary import versions

    installed = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module)]
    about: dict[str, Any] = {
        **versions(),
        "system": platform.platform(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "devices": ", ".join(f"{one.platform}:{one.id} {one.device_kind}" for one in jax.devices()),
        "downloads": str(cache_dir()),
        "extras": ", ".join(installed) or "none",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    if json:
        print(json_.dumps(about, indent=2))
    else:
        print("\n".join(f"{name:18}{value}" for name, value in about.items()))
    return 0
