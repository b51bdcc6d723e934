"""Refuses what Hydra lets through, before torch is imported: names that mean nothing, values that cannot be, secrets."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm import signatures
from ldm.config_errors import CONFIGS, nearest, unknown
from ldm.errors import UserError

# `_target_` can name any callable of any package (builtins.open, shutil.rmtree ...): only these are built
ALLOWED_TARGETS = ("ldm.", "pytorch_lightning.", "torch.nn.", "torch.optim.", "torchmetrics.")
RANGES = (  # what numbers of these names may be, wherever they stand: lowest, highest, in words
    (1, math.inf, "1 or more",
     "accumulate accumulate_grad_batches batch_size blocks channels columns context_length count every heads in_channels keep "
     "keep_every latent_channels layers limit log_every_n_steps max_bytes max_steps max_streams multipliers n num_nodes "
     "out_channels patch shuffle side steps timesteps total val_batch_size val_check_interval val_samples width"),
    (0, math.inf, "0 or more",
     "depth depths gradient_clip_val input_perturbation middle_depth noise_scale num_workers "
     "offset_noise penalty_weight perceptual_weight price_per_hour r1 seed start timeout vector_channels warmup weight_decay"),
    (1e-12, 10, "above 0 and at most 10", "lr"),
    (1e-12, 1e5, "above 0 and at most 1e5", "beta_end beta_start rho sigma_data sigma_max std"),
    (0, 1, "a share from 0 to 1", "budget caption_dropout dropout percentile revive_below whole"),
    (0, 1 - 1e-9, "from 0 to below 1", "betas decay"),
)  # fmt: skip
CHOICES = {"resume": ("auto", "must", "never")}
_RANGE_OF: dict[str, Any] = {name: bounds for *bounds, names in RANGES for name in names.split()}
_SECRET = re.compile(r"(api_?key|access_?key|secret|password|(?<![a-z])token)$", re.IGNORECASE)


def check(cfg: DictConfig) -> None:
    """Refuses a composed config that cannot run as it stands.

    Raises:
        UserError: a missing value, a key or an argument that nothing takes, a value of the wrong kind or out of range, a
            batch that the ranks cannot share, a number that YAML reads as another, a secret, a `_target_` outside
            ALLOWED_TARGETS. It names the nearest valid name.
    """
    missing = [path for path, value in leaves(cfg) if value == "???"]
    if missing:
        hint = " (an experiment=... gives them)" if "name" in missing else ""
        raise UserError(f"{missing[0]} is required: give {' '.join(f'{key}=...' for key in missing)}{hint}")
    _check_first_keys(cfg)
    _check_traps()
    check_targets(cfg)
    for path, value in leaves(cfg):
        _check_choice(path, value)
        _check_range(path, value)
    _check_batch(cfg)
    for node, path in _objects(cfg):  # last: it reads sources
        _check_object(node, path)
    refuse_secrets([f"{key}={value}" for key, value in leaves(_resolved(cfg))])


def targets(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, name) of every `_target_`, also of one behind an interpolation."""
    return ((path, str(value)) for path, value in leaves(_resolved(cfg)) if re.search(r"(^|\.)_target_$", path))


def _resolved(cfg: DictConfig) -> Any:
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


def check_targets(cfg: DictConfig) -> None:
    """Raises UserError for a `_target_` that may not be built."""
    for path, value in targets(cfg):
        if not value.startswith(ALLOWED_TARGETS):
            files = "".join(file.read_text(encoding="utf-8") for file in CONFIGS.rglob("*.yaml"))
            near = difflib.get_close_matches(value, set(re.findall(r"_target_: ([\w.]+)", files)), n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}={value} is refused; it must begin with one of {', '.join(ALLOWED_TARGETS)}{meant}")


def refuse_secrets(assignments: list[str]) -> None:
    """Raises UserError for a `key=value` whose key names a secret, or that holds one of the environment's: a run writes both."""
    held = {n: v for n, v in os.environ.items() if _SECRET.search(n) and len(v) >= 16}
    for assignment in assignments:
        key = assignment.partition("=")[0].lstrip("+~")
        of_environment = next((name for name, value in held.items() if value in assignment), None)
        if of_environment or _SECRET.search(key):
            whose = f"the value of {of_environment}" if of_environment else "a secret"
            raise UserError(
                f"{key} holds {whose}, and a run writes its configuration to files: put it in "
                f"{of_environment or 'WANDB_API_KEY'} in the environment, and nowhere else"
            )


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value as it is written: ??? where it is missing; interpolations are left out."""
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        here = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            yield here, "???"
        elif OmegaConf.is_interpolation(node, key):
            continue
        elif OmegaConf.is_config(node[key]):
            yield from leaves(node[key], here)
        else:
            yield here, node[key]


def _check_first_keys(cfg: DictConfig) -> None:
    """Of the top level, and of what is not built: the primary config and the groups say what there is."""
    primary = yaml.safe_load((CONFIGS / f"{HydraConfig.get().job.config_name}.yaml").read_text(encoding="utf-8"))
    known = {*primary, *(path.name for path in CONFIGS.iterdir() if path.is_dir()), "name"}
    for key in map(str, cfg):
        if key not in known:
            raise UserError(unknown(key, cfg))
        default = primary.get(key)
        if isinstance(default, dict) and not isinstance(cfg[key], DictConfig):
            raise UserError(f"{key}={cfg[key]} is {_kind(cfg[key])}; it takes a mapping of {', '.join(default)}")
        if isinstance(default, dict) and set(cfg[key]) - set(default):
            name = min(set(cfg[key]) - set(default))
            raise UserError(f"unknown key {key}.{name}{nearest(name, default)}")
        if type(default) in (int, bool) and type(cfg[key]) is not type(default):
            raise UserError(f"{key}={cfg[key]} is {_kind(cfg[key])}; it takes {type(default).__name__}")
    for group in ("callbacks", "metrics"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not (OmegaConf.is_config(node) and "_target_" in node):
                raise UserError(f"unknown key {group}.{name}{nearest(name, [k for k in cfg[group] if k != name])}")
    name = cfg.name
    if not isinstance(name, str) or not re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", name, re.ASCII) or ".." in name:
        raise UserError(f"name={name} names a directory under runs/; use letters, digits and _ . , = + - /")


def _check_traps() -> None:
    """In the chosen files: 010 is 8 and 12:30 is 750 to YAML."""
    for group, options in HydraConfig.get().runtime.choices.items():
        for option in options if OmegaConf.is_list(options) else [options]:
            path = CONFIGS / str(group) / f"{option}.yaml"
            if path.is_file():
                refuse_traps(path)


def refuse_traps(path: Path) -> None:
    """Raises UserError for the first number of a file that YAML reads as another."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    nodes = [yaml.compose(path.read_text(encoding="utf-8"), Loader=loader)]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, yaml.MappingNode):
            nodes = [part for pair in node.value for part in pair] + nodes
        elif isinstance(node, yaml.SequenceNode):
            nodes = node.value + nodes
        elif node is not None and node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-9_]|.*:", node.value):
            read = yaml.safe_load(node.value)
            raise UserError(
                f"{path.name}, line {node.start_mark.line + 1}: YAML reads {node.value} as {read}; "
                f"write {node.value.lstrip('0') if ':' not in node.value else read}, or '{node.value}' for text"
            )


def _check_choice(path: str, value: Any) -> None:
    group = path.replace(".", "/")
    if value is not None and (CONFIGS / group).is_dir():
        options = [file.stem for file in (CONFIGS / group).glob("*.yaml")]
        near = f"write {group}={value}" if value in options else f"write {group}=...{nearest(str(value), options)}"
        raise UserError(f"{path}={value} is no choice: {near}")
    if path in CHOICES and value not in CHOICES[path]:
        raise UserError(f"{path}={value} is not one of {', '.join(CHOICES[path])}{nearest(str(value), CHOICES[path])}")


def _check_range(path: str, value: Any) -> None:
    name = next(part for part in reversed(path.split(".")) if not part.isdigit())
    if value is None or name not in _RANGE_OF or (name == "val_check_interval" and isinstance(value, float)):
        return
    low, high, words = _RANGE_OF[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{path}={value} is {_kind(value)}; it takes a number, {words}")
    if not low <= value <= high:
        raise UserError(f"{path}={value} is out of range: it is {words}")


def _objects(node: Any, path: str = "") -> Iterator[tuple[DictConfig, str]]:
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_config(node[key]) and not OmegaConf.is_interpolation(node, key):
            here = f"{path}.{key}" if path else str(key)
            if isinstance(node[key], DictConfig) and "_target_" in node[key]:
                yield node[key], here
            yield from _objects(node[key], here)


def _check_object(node: DictConfig, path: str) -> None:
    """That its target is there, takes what it is given, and is given what it needs."""
    target = node._target_
    try:
        takes = signatures.signature(target)
    except signatures.UnknownName as error:
        name, names = error.args
        raise UserError(f"{path}._target_={target}: there is no {name}{nearest(name, names)}") from None
    if takes is None:
        return
    given = {str(key) for key in node if not str(key).startswith("_")}
    for key in sorted(given):
        if key not in takes.takes:
            rule = OmegaConf.is_config(node[key]) and "_target_" in node[key]  # of guidance
            if not takes.rest or (not rule and difflib.get_close_matches(key, takes.takes, cutoff=0.8)):
                raise UserError(_not_taken(f"{path}.{key}", node, takes.takes))
        elif not OmegaConf.is_interpolation(node, key):  # which is checked where it points to
            _check_kind(f"{path}.{key}", node[key], takes.takes[key])
    needed = takes.needs - given
    if needed and not node.get("_partial_") and "_args_" not in node:
        raise UserError(f"{path}.{min(needed)} is required: {target} takes it, and it is not given")


def _not_taken(key: str, node: DictConfig, takes: Mapping[str, Any]) -> str:
    """By the object that the node makes. An experiment may give what another choice than its own has no use for."""
    place, _, name = key.rpartition(".")
    group = place.replace(".", "/")
    chosen = HydraConfig.get().runtime.choices.get(group)
    typed = any(override.lstrip("+~").startswith(key) for override in HydraConfig.get().overrides.task)
    if chosen is None or typed or difflib.get_close_matches(name, takes):
        return unknown(key, node, takes)
    return f"{group}={chosen} takes no {key}, which the experiment gives: leave it out with '~{key}'"


def _check_kind(path: str, node: Any, kind: signatures.Place | None) -> None:
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    wants = signatures.wants(kind, value)
    if wants is not None:
        shown = "null" if value is None else value
        raise UserError(f"{path}={shown} is {_kind(value)}; it takes {wants}{_hint(value, wants)}")


def _hint(value: Any, wants: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"[-+]?0*\d[\d_]*", value):
        return f": write {int(value)}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f": write {int(value)}"
    if isinstance(value, bool) and "str" in wants:
        return ": YAML reads no, off, yes and on as false and true; quote it"
    if isinstance(value, str) and "bool" in wants:
        return ": write true or false"
    close = difflib.get_close_matches(str(value), wants.split(", "), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def _check_batch(cfg: DictConfig) -> None:
    """The same line as data/datamodule.py's, where the ranks are known before there are any."""
    trainer = cfg.get("trainer") or {}
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    ranks = devices * nodes if type(devices) is type(nodes) is int and devices > 0 else 1
    accumulate, batch = trainer.get("accumulate_grad_batches", 1), cfg.data.get("batch_size")
    if type(accumulate) is type(batch) is int and batch % (ranks * accumulate):
        raise UserError(
            f"data.batch_size={batch} cannot be split over {ranks} ranks x {accumulate} accumulation steps; "
            f"use a multiple of {ranks * accumulate}"
        )
