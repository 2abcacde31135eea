"""Hydra: a command's config file and the user's overrides -> plain resolved data. The only file that knows Hydra."""

import difflib
import itertools
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

_MODULE = "sigmoe.configs"
_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def compose_command(command: str, overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """Compose `command`'s config with `overrides`, resolve it and return plain data.

    `config_dir` is a folder of the user's own groups, searched after sigmoe's. Raises ValueError in one line.
    """
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ValueError(
                f"{override!r} is not an override: write key=value (sigmoe {command} --help lists the keys)"
            )
    search = []
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"--config-dir {config_dir} is not a directory")
        search = [f"hydra.searchpath=['file://{_escaped(str(folder))}']"]
    try:
        with initialize_config_module(_MODULE, version_base="1.3"):
            config = compose(command, overrides=[*overrides, *search])
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error).splitlines()[0].rpartition(": ")[2]
        raise ValueError(f"missing key {key}: give {key}=... (sigmoe {command} --help)") from error
    # A user's file may be no mapping (OSError), nested without end, or have an empty `!!int` (IndexError in PyYAML).
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, LookupError, RecursionError) as error:
        raise ValueError(_one_line(command, overrides, error)) from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def sweep_points(command: str, overrides: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the overrides of one value, and those that each point of a sweep adds to them.

    `lr=1,2 seed=range(3)` has six points, the last key changing fastest; without a key of several values there is
    none. Raises ValueError in one line.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        fixed, swept = list[str](), list[list[str]]()
        for text, override in zip(overrides, parsed):
            if not override.is_sweep_override():
                fixed.append(text)
            elif override.is_discrete_sweep():
                key = override.get_key_element()
                swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                raise ValueError(f"{text!r} has no end of values: write them out, or as range(first,beyond,step)")
    except HydraException as error:
        raise ValueError(_one_line(command, overrides, error)) from error
    return fixed, [list(point) for point in itertools.product(*swept)] if swept else []


def quoted_override(key: str, value: str) -> str:
    """Return the override that sets `key` to `value` as it stands."""
    return f"{key}='{_escaped(value)}'"


def describe_command(command: str) -> str:
    """Return the command's config file as it stands, with its comments, and the choices of every group."""
    lines = (_FOLDER / f"{command}.yaml").read_text(encoding="utf-8").rstrip().splitlines()
    groups = {line.strip(" -").partition(":")[0] for line in lines if line.startswith("  - ")}
    text = [*lines]
    for group in sorted(groups):
        if (_FOLDER / group).is_dir():
            names = sorted(path.stem for path in (_FOLDER / group).glob("*.yaml"))
            text += ["", f"{group}={'|'.join(names)}"]
            for name in names:
                text += ["", f"# {group}={name}", *(_FOLDER / group / f"{name}.yaml").read_text("utf-8").splitlines()]
    return "\n".join(text)


def _escaped(text: str) -> str:
    """Return `text` as it stands between single quotes in Hydra's grammar: a backslash counts only before a quote."""
    return re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)


def _one_line(command: str, overrides: list[str], error: Exception) -> str:
    """Say in one line what is wrong, and name the nearest key where one is unknown."""
    text = str(error).strip() or str(error.__cause__ or repr(error)).strip()  # Hydra's own may be empty: `a: ${b`
    first = text.splitlines()[0].rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read ({first}): quote lists, groups and special characters for the shell"
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
        known = _keys(command, [override for override in overrides if not override.lstrip("+~").startswith(key)])
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        return f"unknown key {key}" + (
            f"; did you mean {' or '.join(near)}?" if near else f" (sigmoe {command} --help)"
        )
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing:
        choices = sorted(path.stem for path in (_FOLDER / missing[1]).glob("*.yaml"))
        return f"unknown choice {missing[1]}={missing[2]}; sigmoe's choices: {', '.join(choices)}"
    rest = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    return "; ".join([first, *rest[:2]]) if rest and (len(first) < 60 or first.endswith(":")) else first


def _keys(command: str, overrides: list[str]) -> list[str]:
    try:
        with initialize_config_module(_MODULE, version_base="1.3"):
            return list(_leaves(compose(command, overrides=overrides), ""))
    except (HydraException, OmegaConfBaseException):
        return []


def _leaves(config: DictConfig, prefix: str) -> list[str]:
    keys = []
    for key in config:
        name = prefix + str(key)
        keys.append(name)
        value = config._get_node(key)
        if isinstance(value, DictConfig):
            keys += _leaves(value, f"{name}.")
    return keys
