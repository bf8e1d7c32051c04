"""Reads configs from files, command lines and JSON, and checks keys and types."""

import ast
import difflib
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bnjax.errors import ConfigError, UserError
from bnjax.train.config import UNITS, default_config

RENAMED = {
    "data.random_crop": "data.crop",
    "model.scale": "model.use_scale",
    "model.shift": "model.use_bias",
    "optimizer.loss": "optimizer.reduction",
    "optimizer.decay": "optimizer.weight_decay_mask",
    "muon.momentum": "optimizer.momentum",
}


def load(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config defined in a file, with `--config.key=value` overrides applied.

    A duration given in one unit replaces a duration given in another unit.

    Raises:
        UserError: if the file cannot be run, or an override has an unknown key or the wrong type.
    """
    file = find(path, "config")
    try:
        config = runpy.run_path(str(file))["get_config"]()
    except KeyError as error:
        raise UserError(
            f"the config file {path} defines no {error}. It needs a function get_config() that "
            "returns a ConfigDict."
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the config file {path} raised {type(error).__name__}: {error}."
        ) from error
    if not isinstance(config, ConfigDict) or "name" not in config:
        raise UserError(
            f"get_config() in the config file {path} returned no config. Start from "
            "bnjax.train.config.default_config(), change it and return it."
        )
    config = from_dict(config.to_dict())  # rejects unknown keys and wrong types
    given = pairs(overrides)
    for name, text in given.items():
        override(config, name, text)
    for units in UNITS:
        if any(config[name] for name in units if name in given):
            for name in {*units} - {*given}:
                override(config, name, "0")
    config.name = config.name or file.stem
    return config


def find(path: str, kind: str) -> Path:
    """Returns the path of a config or claim file, given its path or the name of an included file.

    Args:
        path: the path of a file, or the name of a config or claim that bnjax includes, such as
            "bn".
        kind: "config" or "claim".

    Raises:
        UserError: if there is no such file.
    """
    if Path(path).is_file():
        return Path(path)
    package = Path(__file__).parents[1]
    # These files are inside an installed package, and next to the package in a checkout.
    homes = [home for home in (package / "configs", package.parent / "configs") if home.is_dir()]
    found = {
        file.stem: file
        for home in homes
        for file in sorted((home if kind == "config" else home / "claims").glob("*.py"))
    }
    if path in found:
        return found[path]
    raise UserError(
        f"there is no {kind} file {path}. Give the path of a {kind} file, or the name of one that "
        f"bnjax includes: {', '.join(found) or 'none found'}."
    )


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Returns a config with the given values, which come from `to_dict` or from JSON.

    Raises:
        UserError: for an unknown key.
        ConfigError: for a value of the wrong type.
    """
    config = default_config()
    for name, value in flat(values).items():
        section, key = _place(config, name)
        section[key] = _of_type(name, value, section[key])
    return config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a flat dict with dotted keys from a nested dict; tuples become lists, as in JSON.

    >>> flat({"model": {"dense": (100,)}, "seed": 0})
    {'model.dense': [100], 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one key to the text from a command line, converted to the type of the key.

    >>> config = default_config()
    >>> override(config, "model.momentum", "0.9")
    >>> override(config, "model.dense", "100")
    >>> config.model.momentum, config.model.dense
    (0.9, (100,))
    """
    section, key = _place(config, name)
    section[key] = _convert(name, text, section[key])


def _place(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """Returns the section that a key belongs to, and the key's name within that section.

    Raises:
        UserError: if there is no such key.
    """
    section: Any = config
    *parents, last = path = name.split(".")
    for depth, key in enumerate(path):
        known = list(section) if isinstance(section, ConfigDict) else []
        if key not in known:
            parent = ".".join(path[:depth])
            at = f"config.{parent}".rstrip(".")
            close = [f"{at}.{one}" for one in difflib.get_close_matches(key, known, 1)]
            # Without a similar name here, look for the same name in all sections.
            close = close or [
                one for one in flat({"config": config.to_dict()}) if one.endswith(f".{last}")
            ]
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            hint = f" It was renamed to config.{RENAMED[name]}." if name in RENAMED else hint
            has = ", ".join(known) or "no keys"
            raise UserError(f"there is no key config.{name}.{hint} {at} has: {has}.")
        if depth < len(parents):
            section = section[key]
    if isinstance(section[last], ConfigDict):
        keys = ", ".join(section[last])
        raise UserError(f"config.{name} is a section; set one of its keys: {keys}.")
    return section, last


def pairs(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the names and values in arguments of the form `--config.a.b=value`.

    Raises:
        UserError: if an argument does not have the expected form.
    """
    found = {}
    for word in overrides:
        name, equals, text = word.removeprefix("--config.").partition("=")
        if not (equals and word.startswith("--config.")):
            raise UserError(
                f"{word!r} is not understood. Overrides look like --config.model.momentum=0.9."
            )
        found[name] = text
    return found


def _convert(name: str, text: str, old: Any) -> Any:
    """Converts the text to the type of `old`."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text.replace("true", "True").replace("false", "False"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(old, tuple) and isinstance(value, int | float):
        value = (value,)
    if isinstance(old, tuple) and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(","))
    return _of_type(name, value, old)


def _of_type(name: str, value: Any, old: Any) -> Any:
    """Converts the value to the type of `old` if that is lossless, for instance int to float."""
    kind = type(old)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind:
        words = {
            str: "text",
            bool: "True or False",
            int: "a whole number",
            float: "a number",
            tuple: "values separated by commas",
        }
        raise ConfigError(name, value, words[kind])
    return value
