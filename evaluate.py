"""Score a run: its own config and averaged weights, its validation captions, one result per guidance scale."""

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from ldm import config


@config.entry_point("evaluate", prepare=config.register_run)
def main(cfg: DictConfig) -> None:
    import torch

    from ldm.evaluation.reconstruction import LatentStatistics
    from ldm.evaluation.scoring import Reference, Round, evaluate
    from ldm.training.autoencoder import AutoencoderModule

    module, step = config.load_run(cfg.checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    cfg.data.val_samples = cfg.n
    reference = Reference.read(config.build(cfg.data).val.batches(cfg.batch_size), cfg.n)

    rounds = [Round("reconstruction", partial(module.reconstruct, reference.images), {"reconstruction": True})]
    extra = []
    if isinstance(module, AutoencoderModule):
        extra.append(LatentStatistics(module.autoencoder.encode))
    for scale in cfg.sweep.guidance or [cfg.sampling.guidance.scale] if not extra else ():
        cfg.sampling.guidance.scale = scale
        made = {"side": cfg.data.side, "seed": cfg.seed, "negative": cfg.negative}
        sample = partial(module.sample, config.build(cfg.sampling), **made)
        protocol = {"sampling": config.plain(cfg.sampling), **made, "weights": "ema"}
        rounds.append(Round(f"guidance {scale:g}", sample, protocol))
    folder = Path(cfg.checkpoint) / "evaluation"
    evaluate(
        rounds, reference, lambda: config.build_each(cfg.metrics) + extra, folder, step, cfg.batch_size, cfg.pictures
    )


if __name__ == "__main__":
    main()
