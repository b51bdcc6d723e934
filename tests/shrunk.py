"""A shipped experiment, shrunk until two steps of it take a second: one set of sizes for all of them."""

import runpy
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from test_text_pretrained import TINY, nodes
from tiny import ROOT

from ldm import config

SIDE = 64  # pixels: the published first stages of f8 give 8 x 8, which a U-Net of four levels halves to 1 x 1
STEPS = 2
# class -> sizes in place of the published ones; what is not here (channels of latents, levels, conditions) stays
SIZES: dict[str, dict[str, Any]] = {
    "ldm.models.unet.UNet": {"channels": 8, "groups": 4, "blocks": 1, "middle_depth": 1},
    "ldm.models.dit.DiT": {"width": 16, "depth": 2, "heads": 2},
    "ldm.models.mmdit.MMDiT": {"width": 16, "depth": 2, "heads": 2, "side": 16},
    "ldm.models.autoencoder.AutoencoderKL": {"channels": 8, "groups": 4, "blocks": 1},
    "ldm.models.autoencoder_vq.AutoencoderVQ": {"channels": 8, "groups": 4, "blocks": 1},
    "ldm.models.quantizer.VectorQuantizer": {"codes": 16},
    "ldm.models.discriminator.PatchDiscriminator": {"channels": 8},
    "ldm.models.text.TransformerText": {"width": 8, "layers": 1, "heads": 2, "context_length": 8},
    "ldm.models.conditioners.SizeCrop": {"width": 8},
    "ldm.models.conditioners.ClassLabel": {"width": 8},
}
PERCEPTUAL = {  # of the same class as LPIPS, without its weights
    "_target_": "ldm.models.perceptual.PerceptualDistance",
    "layers": [{"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": 3}],
    "heads": None, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
}  # fmt: skip


def shrink(cfg: DictConfig) -> None:
    """A composed experiment, in place: sizes, batch and steps; on one CPU, and what would have to be fetched is random."""
    with open_dict(cfg):
        for node in _objects(cfg.model):
            node.update(SIZES.get(node._target_, {}))
        if "conditioner" in cfg.model:
            for node in nodes(cfg.model.conditioner):
                node.config, node.weights = TINY[node.weights], None
            _fit(cfg.model.backbone, cfg.model.conditioner)
        elif cfg.model.loss.get("perceptual"):
            cfg.model.loss.perceptual = PERCEPTUAL
        if cfg.model.get("adversary"):
            cfg.model.adversary.start = 1  # within the steps that are run
        cfg.model.lr_schedule.warmup = 1
        cfg.data.update(side=SIDE, batch_size=4, val_batch_size=4, val_samples=4)
        micro = min(cfg.trainer.accumulate_grad_batches, 2)
        cfg.trainer.update(
            accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32-true", accumulate_grad_batches=micro,
            max_steps=STEPS, val_check_interval=STEPS * micro, log_every_n_steps=1, enable_progress_bar=False,
        )  # fmt: skip
        cfg.callbacks.checkpoint.every = STEPS
        cfg.callbacks.pictures.count = 2
        cfg.sampling.steps = 2


def train(cfg: DictConfig) -> None:
    """What train.py does with a config, in this process."""
    config.check(cfg)
    runpy.run_path(str(ROOT / "train.py"))["main"].__wrapped__(cfg)


def _objects(node: Any) -> Iterator[DictConfig]:
    """Every node that names a class, outer ones first."""
    if isinstance(node, DictConfig) and "_target_" in node:
        yield node
    if isinstance(node, (DictConfig, ListConfig)):
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            if not OmegaConf.is_interpolation(node, key):
                yield from _objects(node[key])


def _fit(backbone: DictConfig, node: DictConfig) -> None:
    """The backbone as wide as what the shrunk conditioner gives, where it takes such a part at all."""
    for name, few in (("heads", 2), ("head_dim", 4)):
        if name in backbone and backbone._target_.endswith("UNet"):
            backbone[name] = few
    if "depths" in backbone:
        backbone.depths = [min(depth, 1) for depth in backbone.depths]
    conditioner = config.build(node)
    first = conditioner.parts[0] if hasattr(conditioner, "parts") else conditioner
    cond = first({"caption": ["0"]})
    others = conditioner.vector_width - first.vector_width
    for name, width in {
        "context_channels": cond.tokens.shape[2],
        "vector_channels": cond.vector.shape[1] + others,
    }.items():
        if backbone.get(name):
            backbone[name] = width
