"""A mistake in one line: what Hydra and its kin say, said plainly, with the nearest name that there is."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ldm import signatures
from ldm.errors import MissingError, UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_LIGHTNINGS = "MisconfigurationException"  # by its name: it is not imported here


@contextmanager
def mistakes_in_one_line(show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or show_traceback:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    """A UserError's own; Lightning has an error of its own for a device that is not here."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return cause.exit_code
        if type(cause).__name__ == _LIGHTNINGS and re.search(r"backend|accelerator|device", str(cause)):
            return MissingError.exit_code
    return UserError.exit_code


def explain(error: BaseException) -> str | None:
    """One line for a user's mistake; None for anything else, which keeps its traceback."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            name = str(cause.missing_cfg_file)
            return f"there is no {name}{nearest(name.rpartition('/')[2], cause.options)}"
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.parent_node is not None:
            return _unlisted(str(cause.full_key), cause.parent_node) or unknown(str(cause.full_key), cause.parent_node)
        if isinstance(cause, TypeError) and isinstance(error, InstantiationException):
            wrong = re.search(r"unexpected keyword argument '(\w+)'|missing \d+ required .*", str(cause))
            if wrong:
                return f"{str(error).rpartition('full_key: ')[2]}: {cause}"
        if isinstance(cause, OverrideParseException):
            key, equals, value = cause.override.partition("=")
            if not equals:
                return f"{key!r} is no override: write key=value, as in experiment=demo"
            return f"{cause.override} cannot be read: quote the value, as in '{key}=\"{value}\"'"
        if type(cause).__name__ == _LIGHTNINGS:
            return f"trainer: {' '.join(str(cause).split())}"
    if isinstance(error, (ConfigCompositionException, OmegaConfBaseException, HydraException)) and not isinstance(
        error, InstantiationException
    ):
        group = re.match(r"Could not override '([^']+)'", str(error))
        if group:
            return f"unknown key {group[1]}{nearest(group[1], groups())}"
        option = re.search(r"Could not load '([^']+)/([^'/]+)'", str(error))
        if option:
            there = [path.stem for path in (CONFIGS / option[1]).glob("*.yaml")]
            return f"there is no {option[1]}/{option[2]}{nearest(option[2], there)}"
        return " ".join(str(error).split("object_type")[0].split())
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost first: that is where it went wrong."""
    if error is not None:
        yield from _causes(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
        yield error


def groups() -> list[str]:
    """Those of configs/, as `model/backbone`."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_dir())


def nearest(name: str, names: Iterable[str]) -> str:
    """How the line about a name that there is not goes on."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(names))}"


def unknown(key: str, beside: DictConfig, takes: Iterable[str] = ()) -> str:
    """The line about a key that is not in the node `beside`: the nearest name in it, or the same name elsewhere.

    Args:
        takes: the arguments of the object that the node makes, which need not all be given.
    """
    last = key.rpartition(".")[2]
    if "/" in last:
        return f"unknown key {key}{nearest(last, groups())}"
    siblings = [str(name) for name in {**dict.fromkeys(takes), **dict.fromkeys(beside)} if name not in (last, "hydra")]
    siblings = [name for name in siblings if not name.startswith("_")]
    siblings += [] if "." in key else [name for name in groups() if "/" not in name and name not in siblings]
    if "." in key and difflib.get_close_matches(last, siblings):
        return f"unknown key {key}{nearest(last, siblings)}"
    root = beside._get_root()
    known = [name for name in names(root) if name != key]
    same = [name for name in known if name.rpartition(".")[2] == last]
    same += [] if "." in key else [name for name in groups() if name.endswith(f"/{last}")]
    if same:
        inside = sorted(same, key=lambda name: (name.split(".")[0] != key.split(".")[0], name.count("."), name))
        return f"unknown key {key}; did you mean {' or '.join(inside[:3])}?"
    if not difflib.get_close_matches(last, siblings):
        close = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in known}, n=1, cutoff=0.75)
        found = [name for name in known if close and name.rpartition(".")[2] == close[0]]
        if found:
            return f"unknown key {key}; did you mean {min(found, key=len)}?"
    return f"unknown key {key}{nearest(last, siblings)}"


def _unlisted(key: str, beside: DictConfig) -> str | None:
    """The line about an argument that the node's object takes, where the yaml does not name it."""
    with suppress(signatures.UnknownName):
        takes = signatures.signature(beside._target_) if "_target_" in beside else None
        if takes is not None and key.rpartition(".")[2] in takes.takes:
            return f"{key} is not listed in the yaml: add it with a plus sign, as in +{key}=..."
    return None


def names(node: Any, path: str = "") -> Iterator[str]:
    """Dotted names of everything in a config that is given there."""
    for key in node:
        here = f"{path}.{key}" if path else str(key)
        if here == "hydra" or OmegaConf.is_interpolation(node, key):
            continue
        yield here
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from names(node[key], here)
