"""Latents of a first stage as one picture: a histogram by channel, and how often each code of a codebook is used."""

import io

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

INK, BLUE = "#333333", "#3b6fb6"
COLUMNS, CHANNELS = 4, 16  # more channels than that are left out


def latent_plot(latents: Tensor, counts: Tensor | None = None) -> Image.Image:
    """latents: (B, z, h, w); counts: (K,) how often each code was chosen, None without a codebook."""
    channels = min(latents.shape[1], CHANNELS)
    panels = channels + (counts is not None)
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * rows + 0.5), dpi=100, layout="constrained")
    left_out = f", the first {channels} of {latents.shape[1]} channels" if channels < latents.shape[1] else ""
    figure.suptitle(f"latents of {len(latents)} pictures{left_out}", color=INK)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for c, axis in enumerate(axes[:channels]):
        values = latents[:, c].flatten().float().cpu()
        axis.hist(values.numpy(), 60, color=BLUE)
        axis.set_title(f"channel {c}: mean {values.mean():.2f}, std {values.std():.2f}", fontsize=9, color=INK)
    if counts is not None:
        used = counts.sort(descending=True).values.cpu()
        axes[channels].fill_between(range(len(used)), used.numpy(), color=BLUE, step="mid")
        share = float(used.gt(0).double().mean())
        axes[channels].set_title(f"uses of {len(used)} codes, sorted: {share:.0%} used", fontsize=9, color=INK)
    for axis in axes[:panels]:
        axis.tick_params(colors=INK, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[panels:]:
        axis.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
