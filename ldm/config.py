"""Everything that knows Hydra outside the entry points: compose, refuse in one line, build objects, read a run back.

torch is imported only inside the functions that need it: a refused command line answers at once.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ldm.config_check import ALLOWED_TARGETS, check, check_targets, leaves, refuse_secrets, targets
from ldm.config_errors import CONFIGS, explain, mistakes_in_one_line, nearest
from ldm.config_help import page
from ldm.errors import UserError
from ldm.files import aside

if TYPE_CHECKING:
    from torch import nn

    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.sampling import Sampling
    from ldm.models.autoencoder import Autoencoder
    from ldm.models.first_stage import FirstStage
    from ldm.training.base import TrainingModule

__all__ = ["CONFIGS", "check", "explain", "leaves"]  # for those who work with configs: one module to import
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

        @functools.wraps(main)
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and exiting
            sys.argv[1:] = [quote_ranges(argument) for argument in sys.argv[1:]]
            with mistakes_in_one_line(show_traceback):
                if {"--help", "-h"} & {*sys.argv[1:]}:
                    return page(config_name)
                refuse_secrets(sys.argv[1:])
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


def build(node: DictConfig, **objects: Any) -> Any:
    """The object tree of a config tree, leaves first; lists and dicts arrive plain.

    Raises UserError for a `_target_` that may not be built: a run's directory, too, may come from elsewhere.
    """
    check_targets(node)
    for path, target in targets(node):  # a module of ours may hold another's name: ldm.config.os
        home = getattr(hydra.utils.get_object(target), "__module__", None)
        if not f"{home}.".startswith((*ALLOWED_TARGETS, "torch._C.")):
            raise UserError(f"{path}={target} is refused: it is {home}'s, not one of ours")
    return hydra.utils.instantiate(node, _convert_="all", **objects)


def plain(node: DictConfig) -> Any:
    """A node as plain data, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)


def build_each(nodes: DictConfig | None) -> list[Any]:
    """The objects of a group of named nodes (callbacks, metrics); a node set to null is left out."""
    return [build(node) for node in (nodes or {}).values() if node is not None]


def compose(*overrides: str) -> DictConfig:
    """A training config, as the command line would compose it."""
    register_networks(list(overrides))
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def open_run(cfg: DictConfig) -> Path:
    """Makes the run directory with its resolved config.yaml; a directory made by another config is refused.

    Values given by interpolation and what FREE names may change between sessions of one run.
    """
    run_dir = Path(cfg.run_dir)
    saved_path = run_dir / "config.yaml"
    if any((run_dir / "checkpoints").glob("step_*.ckpt")):  # without one there is nothing to continue
        saved = cast(DictConfig, OmegaConf.load(saved_path))
        for key, (before, now) in _differences(saved, cfg).items():
            if not f"{key}.".startswith(FREE):
                raise UserError(
                    f"{run_dir} was made with {key}={before}, now it is {now}: give another name=, or delete {run_dir}"
                )
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with aside(saved_path) as partial:
        OmegaConf.save(cfg, partial, resolve=True)
    return run_dir


def _differences(saved: DictConfig, cfg: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value in a run's config and in another that is composed; interpolations aside."""
    pairs = {key: (OmegaConf.select(saved, key), value) for key, value in leaves(cfg)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def changes(run: str | Path) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """The experiment that a run was made from, and dotted key -> its value in the run and in the experiment as it is now.

    What an older run says nothing of is left out.
    """
    saved = run_config(run)
    experiment = OmegaConf.select(saved, "logger.group") or saved.name
    if experiment not in options("experiment"):
        return None, {}
    differ = _differences(saved, compose(f"experiment={experiment}"))
    return experiment, {key: pair for key, pair in differ.items() if pair[0] is not None and pair[1] != "???"}


def run_config(run: str | Path, command: str = "python train.py experiment=...") -> DictConfig:
    """The resolved config of a run.

    Raises:
        UserError: there is no such run, with the command that trains it.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"there is no run in {run} (no {path.name}); train it first: {command}")
    return cast(DictConfig, OmegaConf.load(path))


def _weights(run: str | Path, command: str, at: int | None = None) -> dict[str, Any]:
    from ldm.training import checkpointing

    there = {checkpointing.step_of(path): path for path in checkpointing.by_step(Path(run))}
    if not there:
        raise UserError(f"the run in {run} has no checkpoint yet; train it first: {command}")
    if at is not None and at not in there:
        raise UserError(f"the run in {run} has no checkpoint of step {at}; there are: {', '.join(map(str, there))}")
    return checkpointing.read(there[max(there) if at is None else at])


def _average(run: str | Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """name -> averaged tensor."""
    if "ema" not in checkpoint:
        raise UserError(f"the run in {run} has no averaged weights (callbacks.ema=null): only ema=raw can take it")
    return checkpoint["ema"]["weights"]


def load_run(run: str | Path, ema: float | str | None = None, at: int | None = None) -> tuple["TrainingModule", int]:
    """A run's module under its averaged weights, in evaluation mode, and the step they are from.

    Args:
        ema: None: the classical average; "raw": none; else see power_ema.chosen.
        at: step of the checkpoint; None: the newest.
    """
    from ldm.training import power_ema
    from ldm.training.ema import load

    cfg = run_config(run)
    checkpoint = _weights(run, f"python train.py name={Path(run).name} ...", at)
    module = build(cfg.model)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    step = checkpoint["global_step"]
    if ema is None:
        load(module, _average(run, checkpoint))
    elif ema != "raw":
        weights, step = power_ema.chosen(run, ema, step)
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
    saved = checkpoint["state_dict"] | _average(run, checkpoint)
    # what the checkpoint leaves out was frozen, and has come with the network: a decoder's fine-tuning
    state = network.state_dict() | {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    network.load_state_dict(state)
    return network, checkpoint


def _scores(run: Path, step: int) -> dict[str, float]:
    """What evaluate.py found of this checkpoint's reconstructions."""
    scores: dict[str, float] = {}
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


def options(group: str) -> list[str]:
    """The names in configs/<group>."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def option(group: str, name: str, otherwise: str = "") -> DictConfig:
    """configs/<group>/<name>.yaml, as it is written. Raises UserError for one that is not there: `otherwise`, and the nearest."""
    names = options(group)
    if name not in names:
        raise UserError(f"{otherwise or f'there is no {group}={name}'}{nearest(name, names)}")
    return cast(DictConfig, OmegaConf.load(CONFIGS / group / f"{name}.yaml"))


def sampling(
    cfg: DictConfig, solver: str | None = None, guidance: float | None = None, steps: int | None = None
) -> tuple["Sampling", dict[str, Any]]:
    """How a run samples, with these changes, and the same as plain data. Raises UserError for what cannot be."""
    node = cfg.sampling.copy()
    if solver is not None:
        node.solver = option("sampling/solver", solver)
    if guidance is not None:
        node.guidance.scale = guidance
    if steps is not None:
        node.steps = steps
    try:
        return build(node), plain(node)
    except Exception as error:
        if message := explain(error):
            raise UserError(message) from None
        raise


def averaged_weights(run: str | Path) -> dict[str, Any]:
    """name -> tensor of everything that a run trains."""
    return _average(
        run, _weights(run, f"python train.py name={Path(run).name} ..., or import it: ldm import SOURCE {run}")
    )


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


def register_networks(argv: list[str]) -> None:
    """The same for training: the networks, sampling and picture size of the run named by init_from=..., as the config `run`.

    How that run was trained (optimizer, lr_schedule, seed, data) is not taken over. See experiment/finetune_sd.
    """
    run = dict(argument.partition("=")[::2] for argument in argv).get("init_from")
    node: dict[str, Any] = {"model": {"_target_": "ldm.config.no_networks"}, "sampling": {}, "data": {"side": 1}}
    if run:
        cfg = plain(
            run_config(run, f"python train.py name={Path(run).name} ..., or import it: ldm import SOURCE {run}")
        )
        model = {key: value for key, value in cfg["model"].items() if key not in ("optimizer", "lr_schedule", "seed")}
        node = {"model": model, "sampling": cfg["sampling"], "data": {"side": cfg["data"]["side"]}}
    ConfigStore.instance().store(name="run", node=OmegaConf.create(node), package="_global_")


def no_networks(**_: Any) -> None:
    """Stands for the networks of a run that nobody named. Raises UserError."""
    raise UserError("init_from is required: this experiment trains the networks of a run on; give init_from=runs/...")
