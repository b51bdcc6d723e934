"""The network in its parameterization's coat: everything outside sees only an estimate of x0."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning, repeated
from ldm.diffusion.parameterization import Parameterization

# (x (B, C, H, W), sigma ()) -> x0_hat, the only thing a solver sees. sigma stays on the host: reading it costs nothing.
DenoiseFn = Callable[[Tensor, Tensor], Tensor]


class Denoiser(nn.Module):
    """D(x; σ, cond) = c_skip·x + c_out·F(c_in·x, c_noise, cond) (Karras et al. 2022, equation 7).

    Args:
        backbone: F, called as (x_in (B, C + S, H, W), c_noise (B,), cond) -> (B, C, H, W). With `shares_rows` it takes
            cond of k B rows, and returns as many: what it computes before it looks at cond, it computes once.
        parameterization: what F predicts.
    """

    def __init__(self, backbone: nn.Module, parameterization: Parameterization) -> None:
        super().__init__()
        self.backbone = backbone
        self.parameterization = parameterization

    def prepared(self, cond: Conditioning) -> Conditioning:
        """The same conditioning for this denoiser alone, with what its backbone computes of it once for all steps."""
        return self.backbone.prepared(cond) if hasattr(self.backbone, "prepared") else cond

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """x: (B, C, H, W) = x0 + σ·noise; sigma: (B,) or (), on any device. Returns x0_hat, (B, C, H, W) float32.

        With k B rows, cond holds k conditions of all of x, one after the other, and so does x0_hat.
        """
        # The coat stays float32 around a bfloat16 F: autocast leaves products alone and c_out·F promotes. Predicting
        # noise, c_skip·x and c_out·F nearly cancel at large σ: in bfloat16 x0 would be lost.
        rows = len(cond.tokens)
        x = x.float() if getattr(self.backbone, "shares_rows", False) else repeated(x.float(), rows)
        sigma = sigma.to(x.device, torch.float32, non_blocking=True)
        sigma = sigma.expand(len(x)) if sigma.dim() == 0 else repeated(sigma, len(x))
        coefficients = self.parameterization.coefficients(sigma)
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in coefficients[:3])
        prediction = self.backbone(cond.concat_to(c_in * x), coefficients.c_noise, cond)
        return repeated(c_skip * x, rows) + repeated(c_out, rows) * prediction
