"""Score a run: its own config and averaged weights, its validation captions, one result per guidance scale."""

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from ldm import config


@config.entry_point("evaluate", prepare=config.register_run)
def main(cfg: DictConfig) -> None:
    import torch

    from ldm.errors import UserError
    from ldm.evaluation.scoring import Reference, Round, evaluate

    module, step = config.load_run(cfg.checkpoint)
    if not hasattr(module, "sample"):
        raise UserError(f"{cfg.checkpoint} is an autoencoder's run: its scores are in {cfg.checkpoint}/metrics.jsonl")
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    cfg.data.val_samples = cfg.n
    reference = Reference.read(config.build(cfg.data).val.batches(cfg.batch_size), cfg.n)

    rounds = [Round("reconstruction", partial(module.reconstruct, reference.images), {"reconstruction": True})]
    for scale in cfg.sweep.guidance or [cfg.sampling.guidance.scale]:
        cfg.sampling.guidance.scale = scale
        made = {"side": cfg.data.side, "seed": cfg.seed, "negative": cfg.negative}
        sample = partial(module.sample, config.build(cfg.sampling), **made)
        protocol = {"sampling": config.plain(cfg.sampling), **made, "weights": "ema"}
        rounds.append(Round(f"guidance {scale:g}", sample, protocol))
    folder = Path(cfg.checkpoint) / "evaluation"
    evaluate(rounds, reference, lambda: config.build_each(cfg.metrics), folder, step, cfg.batch_size, cfg.pictures)


if __name__ == "__main__":
    main()
