"""Score a run: its own config and averaged weights, its validation captions, one result for each setting of a sweep."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from ldm import config
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.evaluation.scoring import Reference, Result, Round
    from ldm.training.base import TrainingModule

PRECISIONS = ("32-true", "bf16-mixed")  # as Lightning calls them


def prepare(argv: list[str]) -> None:
    """A protocol's choices replace the run's own whole, as those of the command line do."""
    name = dict(argument.partition("=")[::2] for argument in argv).get("protocol")
    path = config.CONFIGS / "protocol" / f"{name}.yaml"
    chosen = OmegaConf.load(path).defaults if path.is_file() else []
    groups = [(key.split("/", 1)[1], value) for entry in chosen for key, value in entry.items()]
    config.register_run([*(f"{group}={value}" for group, value in groups), *argv])


def load(cfg: DictConfig, ema: float | str | None) -> tuple["TrainingModule", int]:
    from ldm.evaluation.generate import Ranks

    module, step = config.load_run(cfg.checkpoint) if ema is None else config.load_run(cfg.checkpoint, ema)
    return module.to(Ranks.of_environment().device()), step


def rounds(
    cfg: DictConfig, module: "TrainingModule", step: int, reference: "Reference", floor: "Reference | None"
) -> Iterator["Round"]:
    """Real pictures where there are others, reconstructions, and each setting of the sweep; one module at a time."""
    from ldm.evaluation.generate import Sample, in_bfloat16
    from ldm.evaluation.scoring import Round
    from ldm.training.base import digest
    from ldm.training.ema import trainable

    dtype = {} if cfg.precision == "32-true" else {"dtype": cfg.precision}  # without, ids are what they always were

    def computed(make: Sample) -> Sample:
        return in_bfloat16(make, module.device.type) if dtype else make

    if floor is not None:
        others, images = floor.protocol(), floor.images
        assert images is not None
        real = {"made": "real", "others": {name: others[name] for name in ("captions", "reference")}}
        yield Round("real", lambda _, index: images[index].float() / 127.5 - 1, real, captions=floor.captions)
    samples = hasattr(module, "sample")
    weights = digest(trainable(module))[:16]
    if reference.images is not None:
        seen = digest(module.first_stage.state_dict())[:16] if samples else weights  # whatever average is asked for
        make = computed(partial(module.reconstruct, reference.images))
        yield Round("reconstruction", make, {"made": "reconstruction", **dtype}, seen)
    if not samples:
        return
    sweep = cfg.sweep
    first = (sweep.ema or [cfg.ema])[0]
    for ema, steps, scale in product(
        sweep.ema or [cfg.ema], sweep.steps or [cfg.sampling.steps], sweep.guidance or [cfg.sampling.guidance.scale]
    ):
        if ema != first:
            module, step = load(cfg, ema)
            weights, first = digest(trainable(module))[:16], ema
        cfg.sampling.guidance.scale, cfg.sampling.steps = scale, steps
        made = {"side": cfg.data.side, "seed": cfg.seed, "negative": cfg.negative}
        how = {
            "weights": "ema" if ema is None else f"average {ema}, step {step}",
            "dtype": str(module.dtype).removeprefix("torch."),
            **dtype,
        }
        average = "default" if ema is None else ema
        if isinstance(ema, str):
            average = Path(ema).stem  # of a file
        values = {"guidance": scale, "steps": steps, "ema": average}
        swept = {name: value for name, value in values.items() if sweep[name]}
        named = {"guidance": f"{scale:g}"} | {name: value for name, value in swept.items() if name != "guidance"}
        label = " ".join(f"{name} {value}" for name, value in named.items())
        protocol = {
            "sampling": config.plain(cfg.sampling),
            **made,
            **how,
            "noise": "keyed by (seed, index of the caption)",
        }
        make = computed(partial(module.sample, config.build(cfg.sampling), **made))
        yield Round(label, make, protocol, weights, swept)


def log(cfg: DictConfig, results: list["Result"], step: int) -> None:
    """Into the run's own W&B run, if it has one: every score under its protocol, one table, the curve."""
    node = config.run_config(cfg.checkpoint).get("logger")
    if not (cfg.log and node and results):
        return
    node.run_dir = cfg.checkpoint
    logger = config.build(node)
    for result in results:
        logger.log_metrics(result.logged(), step=step)
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows = [[result.label, result.protocol["id"], *(result.metrics.get(name) for name in names)] for result in results]
    logger.log_table("evaluation/table", columns=["round", "protocol", *names], data=rows)
    for name in ("curve", "grid"):
        if (picture := results[-1].folder / f"{name}.png").exists():
            logger.log_image(f"evaluation/{name}", [str(picture)])


@config.entry_point("evaluate", prepare=prepare)
def main(cfg: DictConfig) -> None:
    from torch import distributed

    from ldm.evaluation.generate import Ranks
    from ldm.evaluation.metrics import FeatureMetrics
    from ldm.evaluation.reconstruction import LatentStatistics
    from ldm.evaluation.scoring import Reference, evaluate
    from ldm.training.autoencoder import AutoencoderModule

    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision} is unknown here; give {' or '.join(PRECISIONS)}")
    ranks = Ranks.of_environment()
    if ranks.world > 1:
        ranks.meet()
    module, step = load(cfg, (cfg.sweep.ema or [cfg.ema])[0])
    metrics = config.build_each(cfg.metrics)
    pretrained = [
        metric for metric in metrics if isinstance(metric, FeatureMetrics) and [*metric.features.parameters()]
    ]
    for metric in pretrained:
        metric.features.to(module.device)
    if isinstance(module, AutoencoderModule):
        metrics.append(LatentStatistics(lambda images: module.autoencoder.encode(images.to(module.device))))

    cfg.data.val_samples, floor = cfg.n, None
    if cfg.prompts is not None:
        reference = Reference.of_prompts(Path(cfg.prompts), cfg.n)
    else:
        data = config.build(cfg.data)
        reference = Reference.read(data.val.batches(cfg.batch_size), cfg.n)
        if pretrained if cfg.floor is None else cfg.floor:
            cfg.data.val_shards, cfg.data.val_samples = data.sources[0].paths, len(reference.captions)
            floor = Reference.read(config.build(cfg.data).val.batches(cfg.batch_size), len(reference.captions))
    results = evaluate(
        rounds(cfg, module, step, reference, floor), reference, metrics, Path(cfg.checkpoint) / "evaluation", step,
        cfg.batch_size, cfg.pictures, ranks, Path(cfg.reference_cache),
    )  # fmt: skip
    log(cfg, results, step)
    if ranks.world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
