"""A file of settings, for `--config`: YAML, JSON, or the `run.json` that a run left.

    base: HuggingFaceTB/SmolLM2-135M-Instruct
    train: [support.jsonl, chats.jsonl]
    learning_rate: 5e-4

Its keys are the flags without their dashes; flags win over it. One file can serve all commands: a
key that another command has is passed over, one that none has is refused.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from guilomo_train.errors import ConfigError

_NOT_OF_A_FILE = ("help", "config")
# What a run.json says of the run itself, and of no other.
_OF_THAT_RUN = ("resume",)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file, by the names that their dataclasses give them.

    Raises:
        ConfigError: the file cannot be read, or is no mapping of names to values.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"--config {path}: cannot be read ({' '.join(str(e).split())})") from None
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        groups = value["config"].values()
        settings = {key: given for group in groups for key, given in group.items()}
        return {key: given for key, given in settings.items() if key not in _OF_THAT_RUN}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"--config {path}: expected lines of `setting: value`")
    return {key.replace("-", "_"): given for key, given in value.items()}


def take_settings(
    parser: ArgumentParser, settings: Mapping[str, Any], known: Iterable[str], path: Path
) -> None:
    """Makes settings the defaults of a command's flags.

    Args:
        parser: the command's.
        settings: as `read_settings` gives them.
        known: the settings of all commands.
        path: the file, for errors.

    Raises:
        ConfigError: a setting is none of any command, or has a value that its flag does not take.
    """
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest != "help"}
    for key, given in settings.items():
        if key not in known or key in _NOT_OF_A_FILE:
            close = get_close_matches(key, known, n=3)
            meant = f": did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"--config {path}: there is no setting {key!r}{meant}")
        if key in actions and given is not None:
            action = actions[key]
            parser.set_defaults(**{key: _value(action, given, f"--config {path}: {key}")})
            action.required = False


def _value(action: Action, given: Any, where: str) -> Any:
    """What the flag would make of the value; of a list where it has no list, the items with commas
    between them."""
    items = given if isinstance(given, list) else [given]
    for item in items:
        if isinstance(item, dict | list):
            raise ConfigError(f"{where} is {given!r}, expected a value or a list of values")
    if action.nargs == "+":
        return [_one(action, item, where) for item in items]
    return _one(action, ",".join(map(str, items)), where)


def _one(action: Action, given: Any, where: str) -> Any:
    convert: Any = action.type or str
    kind = {"string_to_bool": "true or false", "str": "text", "int": "an integer"}
    expected = kind.get(getattr(convert, "__name__", ""), "a number")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    try:
        value = convert(str(given))
    except (ValueError, ArgumentTypeError, KeyError):
        value = None
    if value is None or (action.choices is not None and value not in action.choices):
        raise ConfigError(f"{where} is {given!r}, expected {expected}")
    return value
