"""Everything that knows Hydra outside the entry points: compose, refuse in one line, build objects, read a run back.

torch is imported only inside the functions that need it: a refused command line answers at once.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ldm.diffusion.denoiser import Denoiser
    from ldm.models.autoencoder import Autoencoder
    from ldm.models.first_stage import FirstStage
    from ldm.training.base import TrainingModule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# `_target_` can name any callable of any package (builtins.open, shutil.rmtree ...): only these are built
ALLOWED_TARGETS = ("ldm.", "pytorch_lightning.", "torch.nn.", "torch.optim.", "torchmetrics.")
HIGHER_IS_BETTER = ("psnr", "ssim", "usage", "perplexity")  # of a first stage's measures; the others are distances
# what one run may change between its sessions: where and how it runs, not what it learns from
FREE = ("trainer.", "callbacks.", "logger.", "resume.", "data.num_workers.", "data.cache.", "data.budget.",
        "data.log_keys.")  # fmt: skip


def entry_point(
    config_name: str, prepare: Callable[[list[str]], None] | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """hydra.main, with every mistake a user can make printed as one line and exit code 2.

    HYDRA_FULL_ERROR=1 shows the traceback instead.

    Args:
        config_name: of the primary config.
        prepare: called with the command line's arguments before the config is composed.
    """

    def wrap(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> None:
            with mistakes_in_one_line(show_traceback):
                check(cfg)
                main(cfg)

        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and exiting
            sys.argv[1:] = [quote_ranges(argument) for argument in sys.argv[1:]]
            with mistakes_in_one_line(show_traceback):
                if prepare is not None:
                    prepare(sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()

        show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
        return run

    return wrap


def quote_ranges(argument: str) -> str:
    """key=a/{00..12}.tar as Hydra wants it, quoted: its grammar reads an unquoted brace as a dictionary."""
    key, _, value = argument.partition("=")
    mapping = re.match(r"\{\s*\w+\s*:", value)
    if re.search(r"\{-?\d+\.\.-?\d+", value) and value[0] not in "'\"[" and not mapping:
        return f"{key}='{value}'"
    return argument


@contextmanager
def mistakes_in_one_line(show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or show_traceback:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str | None:
    """One line for a user's mistake; None for anything else, which keeps its traceback."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            name = str(cause.missing_cfg_file)
            return f"there is no {name}{_nearest(name.rpartition('/')[2], cause.options)}"
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.parent_node is not None:
            names = _groups() if "/" in str(cause.key) else [str(key) for key in cause.parent_node]
            return f"unknown key {cause.full_key}{_nearest(str(cause.key), names)}"
        if isinstance(cause, TypeError) and isinstance(error, InstantiationException):
            wrong = re.search(r"unexpected keyword argument '(\w+)'|missing \d+ required .*", str(cause))
            if wrong:
                return f"{str(error).rpartition('full_key: ')[2]}: {cause}"
    if isinstance(error, (ConfigCompositionException, OmegaConfBaseException, HydraException)) and not isinstance(
        error, InstantiationException
    ):
        return " ".join(str(error).split())
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost first: that is where it went wrong."""
    if error is not None:
        yield from _causes(error.__cause__ or error.__context__)
        yield error


def _groups() -> list[str]:
    return [folder.relative_to(CONFIGS).as_posix() for folder in CONFIGS.rglob("*") if folder.is_dir()]


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(names))}"


def check(cfg: DictConfig) -> None:
    """Refuses what Hydra lets through: a missing value, a new top-level key, a `_target_` outside ALLOWED_TARGETS.

    Raises:
        UserError
    """
    missing = [path for path, value in leaves(cfg) if value == "???"]
    if missing:
        hint = " (an experiment=... gives them)" if "name" in missing else ""
        raise UserError(f"{missing[0]} is required: give {' '.join(f'{key}=...' for key in missing)}{hint}")
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+").partition("=")[0].partition("@")[0]
        if override.startswith("+") and "." not in key and not (CONFIGS / key).is_dir():
            raise UserError(f"unknown key {key}{_nearest(key, [str(k) for k in cfg if k != key])}")
    for path, value in leaves(cfg):
        if path.endswith("_target_") and not str(value).startswith(ALLOWED_TARGETS):
            raise UserError(f"{path}={value} is refused; it must begin with one of {', '.join(ALLOWED_TARGETS)}")
    if not re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", str(cfg.name)) or ".." in cfg.name:
        raise UserError(f"name={cfg.name} names a directory under runs/; use letters, digits and _ . , = + - /")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value as it is written: ??? where it is missing; interpolations are left out."""
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        here = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            yield here, "???"
        elif OmegaConf.is_interpolation(node, key):
            continue
        elif OmegaConf.is_config(node[key]):
            yield from leaves(node[key], here)
        else:
            yield here, node[key]


def build(node: DictConfig, **objects: Any) -> Any:
    """The object tree of a config tree, leaves first; lists and dicts arrive plain."""
    return hydra.utils.instantiate(node, _convert_="all", **objects)


def plain(node: DictConfig) -> dict[str, Any]:
    """A node as plain data, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)


def build_each(nodes: DictConfig | None) -> list[Any]:
    """The objects of a group of named nodes (callbacks, metrics); a node set to null is left out."""
    return [build(node) for node in (nodes or {}).values() if node is not None]


def compose(*overrides: str) -> DictConfig:
    """A training config, as the command line would compose it."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def open_run(cfg: DictConfig) -> Path:
    """Makes the run directory with its resolved config.yaml; a directory made by another config is refused.

    Values given by interpolation and what FREE names may change between sessions of one run.
    """
    run_dir = Path(cfg.run_dir)
    saved_path = run_dir / "config.yaml"
    if any((run_dir / "checkpoints").glob("step_*.ckpt")):  # without one there is nothing to continue
        saved = OmegaConf.load(saved_path)
        for key, value in leaves(cfg):
            if not f"{key}.".startswith(FREE):
                before = OmegaConf.select(saved, key)
                if before != value:
                    raise UserError(
                        f"{run_dir} was made with {key}={before}, now it is {value}: give another name=, or delete {run_dir}"
                    )
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, saved_path, resolve=True)
    return run_dir


def run_config(run: str | Path, command: str = "python train.py experiment=...") -> DictConfig:
    """The resolved config of a run.

    Raises:
        UserError: there is no such run, with the command that trains it.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"there is no run in {run} (no {path.name}); train it first: {command}")
    return OmegaConf.load(path)


def _weights(run: str | Path, command: str) -> dict[str, Any]:
    from ldm.training import checkpointing

    path = checkpointing.newest(Path(run))
    if path is None:
        raise UserError(f"the run in {run} has no checkpoint yet; train it first: {command}")
    return checkpointing.read(path)


def load_run(run: str | Path, ema: float | str | None = None) -> tuple["TrainingModule", int]:
    """A run's module under its averaged weights, in evaluation mode, and the step they are from.

    Args:
        ema: None: the classical average; "raw": none; else see power_ema.chosen.
    """
    from ldm.training import power_ema
    from ldm.training.ema import load

    cfg = run_config(run)
    checkpoint = _weights(run, f"python train.py name={Path(run).name} ...")
    module = build(cfg.model)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    weights, step = checkpoint["ema"]["weights"], checkpoint["global_step"]
    if ema not in (None, "raw"):
        weights, step = power_ema.chosen(run, ema, step)
    if ema != "raw":
        load(module, weights)
    return module.eval(), step


def denoiser(run: str) -> "Denoiser":
    """A run's denoiser under its averaged weights, frozen: autoguidance's weaker one.

    Raises UserError when the run trained its text encoder: another run's conditioning would mean nothing to it.
    """
    module, _ = load_run(run)
    if any(p.requires_grad for p in module.conditioner.parameters()):
        raise UserError(f"{run} trained its own text encoder; autoguidance needs a run whose text encoder is frozen")
    return module.denoiser.requires_grad_(False)


def autoencoder(run: str, command: str, train_encoder: bool = False) -> "Autoencoder":
    """The autoencoder of a run under its averaged weights: to train it on, or its decoder alone.

    Args:
        run, command: see first_stage.
        train_encoder: false freezes all that latents depend on, so that they stay what they are.
    """
    network, _ = _trained_autoencoder(run, command)
    if not train_encoder:
        network.freeze_encoder()
    return network


def first_stage(run: str, command: str, require: dict[str, float] | None = None) -> "FirstStage":
    """The frozen first stage out of an autoencoder's run: averaged weights and latent statistics.

    Args:
        run: the autoencoder's run directory.
        command: what trains it, for the error when it is not there.
        require: measured value -> its bound: at least that for psnr, ssim, usage, perplexity; for a distance, at most.

    Raises:
        UserError: there is no such run, it has no latent statistics, or it does not meet `require`.
    """
    import torch

    from ldm.models.first_stage import FirstStage

    network, checkpoint = _trained_autoencoder(run, command)
    mean, std = checkpoint["state_dict"]["latent_mean"], checkpoint["state_dict"]["latent_std"]
    if not (torch.isfinite(mean).all() and (std > 0).all()):
        raise UserError(f"the autoencoder in {run} has no latent statistics: its run ended before its first validation")
    if require:
        measured = checkpoint.get("measured", {}) | _scores(Path(run), checkpoint["global_step"])
        _refuse_worse(run, require, measured)
    return FirstStage(network, mean.tolist(), std.tolist())


def _trained_autoencoder(run: str, command: str) -> tuple["Autoencoder", dict[str, Any]]:
    cfg = run_config(run, command)
    checkpoint = _weights(run, command)
    network = build(cfg.model.autoencoder)
    prefix = "autoencoder."
    saved = checkpoint["state_dict"] | checkpoint["ema"]["weights"]
    # what the checkpoint leaves out was frozen, and has come with the network: a decoder's fine-tuning
    state = network.state_dict() | {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    network.load_state_dict(state)
    return network, checkpoint


def _scores(run: Path, step: int) -> dict[str, float]:
    """What evaluate.py found of this checkpoint's reconstructions."""
    scores = {}
    for path in sorted((run / "evaluation").glob(f"step{step}-reconstruction-*/results.json"), key=os.path.getmtime):
        scores |= json.loads(path.read_text())["metrics"]
    return scores


def _refuse_worse(run: str, require: dict[str, float], measured: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items()) or "nothing"
    for name, bound in require.items():
        if name not in measured:
            raise UserError(
                f"first_stage.require.{name}={bound:g}, but {run} was not measured by it (measured: {shown}); run "
                f"python evaluate.py checkpoint={run} with the metrics that give it"
            )
        higher = name.endswith(HIGHER_IS_BETTER)
        if not (measured[name] >= bound if higher else measured[name] <= bound):
            raise UserError(
                f"the first stage in {run} has {name} {measured[name]:.4g}, first_stage.require.{name} wants "
                f"{'at least' if higher else 'at most'} {bound:g} (measured: {shown}): train it on, or lower the bar"
            )


def option(group: str, name: str, otherwise: str = "") -> DictConfig:
    """configs/<group>/<name>.yaml, as it is written. Raises UserError for one that is not there: `otherwise`, and the nearest."""
    names = [path.stem for path in (CONFIGS / group).glob("*.yaml")]
    if name not in names:
        raise UserError(f"{otherwise or f'there is no {group}={name}'}{_nearest(name, names)}")
    return OmegaConf.load(CONFIGS / group / f"{name}.yaml")


def averaged_weights(run: str | Path) -> dict[str, Any]:
    """name -> tensor of everything that a run trains."""
    return _weights(run, f"python train.py name={Path(run).name} ...")["ema"]["weights"]


def text_encoder(source: str) -> "nn.Module":
    """A frozen text encoder.

    Args:
        source: a diffusion run's directory, for the encoder it trained or used; or a name in configs/model/conditioner.

    Raises:
        UserError: neither, or a conditioner whose encoder is trained with the denoiser and has no weights of its own.
    """
    if (Path(source) / "config.yaml").is_file():
        return load_run(source)[0].conditioner.encoder.requires_grad_(False)
    node = option("model/conditioner", source, f"text encoder {source!r} is no run's directory and no conditioner")
    encoder = build(node.get("first", node).encoder)
    if any(p.requires_grad for p in encoder.parameters()):
        raise UserError(
            f"conditioner {source} is trained together with a denoiser: give the directory of a run that did"
        )
    return encoder


def register_run(argv: list[str]) -> None:
    """Puts what evaluation takes over from the run named by checkpoint=... into Hydra's store, as the config `run`.

    So `sampling.guidance.scale=4` overrides the run's own value, with Hydra's checks. A group chosen on the command line
    (metrics=..., sampling/solver=..., sampling/guidance=[cfg,rescale] ...) replaces the run's choice whole.
    """
    overrides = dict(argument.partition("=")[::2] for argument in argv)
    node = OmegaConf.create({"name": "run", "model": {}, "data": {}, "sampling": {}, "metrics": {}})
    if overrides.get("checkpoint"):
        node = OmegaConf.masked_copy(run_config(overrides["checkpoint"]), list(node))
    for group in ("metrics", *(f"sampling/{part}" for part in ("solver", "schedule", "spacing", "guidance"))):
        if group in overrides:
            OmegaConf.update(node, group.replace("/", "."), {}, merge=False)
    ConfigStore.instance().store(name="run", node=node, package="_global_")
