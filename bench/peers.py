"""diffusers' schedulers and U-Net and k-diffusion's samplers beside ours: one network, one start, one grid, one noise.

bench/solver_parity.py prints the samplers' table, and tests/test_solver_parity.py holds its bars; bench/train_step.py and
bench/sample.py time the U-Nets.
"""

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import measuring
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion import solvers
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.parameterization import Eps, Flow, Parameterization, V
from ldm.diffusion.schedules import Karras, RectifiedFlow, ScaledLinear, grid
from ldm.interop import layouts
from ldm.interop.keys import autoencoder_keys, unet_keys
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

SHAPE = (2, 4, 8, 8)
COND = Conditioning(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 0))
TABLE = ScaledLinear()
INDEXED = {"eps": Eps(TABLE.index), "v": V(TABLE.index), "flow": Flow()}
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ideal(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth, strongly nonlinear D: each value is near -1 or +1, and neighbors agree a little."""
    s2 = sigma.double().view(-1, 1, 1, 1) ** 2
    x = x.double()
    variance = 0.04 + s2
    alone = (s2 * torch.tanh(x / variance) + 0.04 * x) / variance
    kernel = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 6
    return alone + 0.2 * torch.tanh(nn.functional.conv2d(x / (1 + s2).sqrt(), kernel, padding=1))


class Network(nn.Module):
    """F of this parameterization, whose D is `ideal`: called by ours with c_noise, by the peers with their timestep."""

    def __init__(self, parameterization: Parameterization) -> None:
        super().__init__()
        self.parameterization = parameterization

    def forward(self, x_in: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        label = torch.as_tensor(c_noise, dtype=torch.float64).expand(len(x_in))
        flow = isinstance(self.parameterization, Flow)
        sigma = label / (1 - label) if flow else TABLE(label / (TABLE.timesteps - 1))
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in self.parameterization.coefficients(sigma)[:3])
        x = x_in.double() / c_in
        return ((ideal(x, sigma) - c_skip * x) / c_out).to(x_in.dtype)


class Case(NamedTuple):
    """A peer's scheduler and our solver. scale: of the peer's x over ours at σ; rows of `noise` are taken in order."""

    name: str
    scheduler: Callable[[str], Any]
    solver: Callable[..., Tensor]
    coordinates: str  # "vp": x/√(1+σ²); "ve": x; "flow": x/(1+σ)
    networks: tuple[str, ...]
    note: str = ""


def _vp(kind: Any, **options: Any) -> Callable[[str], Any]:
    names = {"eps": "epsilon", "v": "v_prediction"}
    return lambda network: kind(**{**SD, "prediction_type": names[network], **options})


TO_ZERO = {"final_sigmas_type": "zero"}
DISCRETE = {"clip_sample": False, "set_alpha_to_one": True}
MULTI = {"algorithm_type": "dpmsolver++", "lower_order_final": True, **TO_ZERO}
PARAMETERIZATIONS = ("eps", "v")
CASES = [
    Case("DDIM", _vp(diffusers.DDIMScheduler, **DISCRETE), solvers.euler, "vp", PARAMETERIZATIONS,
         "set_alpha_to_one=True: we end at σ = 0, SD's config at σ = 0.029"),
    Case("DDPM", _vp(diffusers.DDPMScheduler, clip_sample=False), partial(solvers.euler, eta=1.0), "vp", PARAMETERIZATIONS,
         "variance_type fixed_small, the posterior's"),
    Case("Euler", _vp(diffusers.EulerDiscreteScheduler, **TO_ZERO), solvers.euler, "ve", PARAMETERIZATIONS),
    Case("Euler a", _vp(diffusers.EulerAncestralDiscreteScheduler), partial(solvers.euler, eta=1.0), "ve",
         PARAMETERIZATIONS),
    Case("Heun", _vp(diffusers.HeunDiscreteScheduler), solvers.heun, "ve", PARAMETERIZATIONS),
    Case("DPM++ 2M", _vp(diffusers.DPMSolverMultistepScheduler, solver_order=2, **MULTI), solvers.dpmpp_2m, "vp",
         PARAMETERIZATIONS),
    Case("DPM++ 2M SDE", _vp(diffusers.DPMSolverMultistepScheduler, solver_order=2, **MULTI | {"algorithm_type":
         "sde-dpmsolver++"}), partial(solvers.dpmpp_2m, eta=1.0), "vp", PARAMETERIZATIONS),
    Case("UniPC 2", _vp(diffusers.UniPCMultistepScheduler, solver_order=2, solver_type="bh2", **TO_ZERO),
         partial(solvers.unipc, order=2), "vp", PARAMETERIZATIONS),
    Case("UniPC 3", _vp(diffusers.UniPCMultistepScheduler, solver_order=3, solver_type="bh2", **TO_ZERO),
         partial(solvers.unipc, order=3), "vp", PARAMETERIZATIONS),
    Case("PLMS (PNDM)", _vp(diffusers.PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=True), solvers.plms, "vp",
         ("eps",), "set_alpha_to_one=True, as for DDIM; theirs averages v over noise levels, we the noise, as PLMS does"),
    Case("LMS", _vp(diffusers.LMSDiscreteScheduler), solvers.lms, "ve", PARAMETERIZATIONS,
         "their weights are integrated numerically, to 1e-4"),
    Case("FlowMatchEuler", lambda _: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), solvers.euler, "flow", ("flow",),
         "their first t is 1, where our σ is infinite: both start at 0.999"),
]  # fmt: skip

_SCALE = {"vp": lambda s: (1 + s**2) ** -0.5, "ve": lambda s: 1.0, "flow": lambda s: 1 / (1 + s)}


def _levels(scheduler: Any, case: Case, steps: int) -> Tensor:
    """The peer's grid, as ours: (N + 1,) falling to 0."""
    if case.coordinates == "flow":
        scheduler.set_timesteps(sigmas=torch.linspace(0.999, 1 / steps, steps).tolist())
        t = scheduler.sigmas.double()
        return t / (1 - t)
    scheduler.set_timesteps(steps)
    timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))  # second evaluations repeat one
    return torch.cat([TABLE(torch.tensor(timesteps, dtype=torch.float64) / 999), torch.zeros(1, dtype=torch.float64)])


def against_diffusers(case: Case, network: str, steps: int) -> float:
    """Largest absolute difference of x0, float32."""
    net, scheduler = Network(INDEXED[network]), case.scheduler(network)
    sigmas = _levels(scheduler, case, steps)
    scale = _SCALE[case.coordinates]
    x = normal(0) * sigmas[0].item()
    draws: list[Tensor] = []

    def noise(*_: Any, **__: Any) -> Tensor:
        draws.append(normal(100 + len(draws)))
        return draws[-1]

    theirs, module = x * scale(sigmas[0].item()), sys.modules[type(scheduler).__module__]
    before = getattr(module, "randn_tensor", None)
    module.randn_tensor = noise
    try:
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(theirs, t) if hasattr(scheduler, "scale_model_input") else theirs
            label = t / 1000 if case.coordinates == "flow" else t
            theirs = scheduler.step(net(x_in, label), t, theirs).prev_sample
    finally:
        module.randn_tensor = before
    denoise = Guidance()(Denoiser(net, INDEXED[network]), COND, COND)
    injected = iter(range(100, 10_000))
    ours = case.solver(denoise, x, sigmas, lambda *_: normal(next(injected)))
    return (ours - theirs).abs().max().item()


KARRAS_CASES = {
    "sample_euler": solvers.euler,
    "sample_euler_ancestral": partial(solvers.euler, eta=1.0),
    "sample_heun": solvers.heun,
    "sample_lms": solvers.lms,
    "sample_dpmpp_2s_ancestral": partial(solvers.dpmpp_2s, eta=1.0),
    "sample_dpmpp_sde": solvers.dpmpp_sde,
    "sample_dpmpp_2m": solvers.dpmpp_2m,
    "sample_dpmpp_2m_sde": partial(solvers.dpmpp_2m, eta=1.0),
    "sample_dpmpp_3m_sde": partial(solvers.dpmpp_3m, eta=1.0, curvature=1.0),  # theirs is of second order
}


def k_diffusion_sampling() -> Any:
    """k-diffusion's `sampling` module alone: the package's own imports ask for much that no sampler needs."""
    if "k_diffusion" not in sys.modules:
        found = find_spec("k_diffusion")
        if found is None:
            raise ModuleNotFoundError("k-diffusion is not here: pip install --no-deps k-diffusion==0.1.1.post1")
        package = types.ModuleType("k_diffusion")
        package.__path__ = [str(Path(found.origin).parent)]
        sys.modules["k_diffusion"] = package
        for name, attribute in (("torchdiffeq", "odeint"), ("torchsde", "BrownianTree")):
            stub = types.ModuleType(name)
            setattr(stub, attribute, None)  # of its likelihood and its own noise, which are not called here
            sys.modules.setdefault(name, stub)
    return importlib.import_module("k_diffusion.sampling")


def against_k_diffusion(name: str, steps: int, dtype: torch.dtype) -> float:
    """Largest absolute difference of x0 over the same denoiser, on Karras' grid from σ = 14.6."""
    sigmas = grid(Karras(0.0292, 14.6146), steps).to(dtype)
    x = normal(0, dtype) * sigmas[0]
    theirs_seed, ours_seed = iter(range(100, 10_000)), iter(range(100, 10_000))
    sampler = getattr(k_diffusion_sampling(), name)
    options = {}
    if "noise_sampler" in sampler.__wrapped__.__code__.co_varnames:
        options["noise_sampler"] = lambda *_: normal(next(theirs_seed), dtype)
    theirs = sampler(lambda x, sigma: ideal(x, sigma).to(dtype), x, sigmas, disable=True, **options)
    denoise = lambda x, sigma: ideal(x, sigma).to(dtype)  # noqa: E731
    ours = KARRAS_CASES[name](denoise, x, sigmas, lambda *_: normal(next(ours_seed), dtype))
    return (ours - theirs).abs().max().item()


def between_parameterizations(solver: Callable[..., Tensor], steps: int) -> float:
    """Largest absolute difference of x0 between ε, v, x0 and flow networks of one D, float32."""
    from ldm.diffusion.parameterization import X0

    sigmas = grid(RectifiedFlow(0.03, 0.93), steps)
    x, results = normal(0) * sigmas[0], []
    for parameterization in (Eps(TABLE.index), V(TABLE.index), Flow(), X0(TABLE.index)):
        denoise = Guidance()(Denoiser(Network(parameterization), parameterization), COND, COND)
        seeds = iter(range(100, 10_000))
        results.append(solver(denoise, x, sigmas, lambda *_, seeds=seeds: normal(next(seeds))))
    return max((a - results[0]).abs().max().item() for a in results[1:])


SIZES: dict[str, dict[str, Any]] = {  # Stable Diffusion v1's shape, narrower
    "81M": {"channels": 96, "multipliers": [1, 2, 4, 4], "blocks": 2, "depths": [1, 1, 1, 0], "middle_depth": 1,
            "context_channels": 768},
    "toy": {"channels": 32, "multipliers": [1, 2], "blocks": 1, "depths": [1, 0], "middle_depth": 1, "context_channels": 16},
}  # fmt: skip
V1 = {"heads": 8}  # and 1x1 convolutions into the transformers
V2 = {"head_dim": 32, "linear": True}  # heads of one width, and linear layers


def unets(size: str, v2: bool = False) -> tuple[UNet, diffusers.UNet2DConditionModel]:
    """Ours and diffusers' with the same weights, none of them zero, in training mode."""
    arguments = {"in_channels": 4, "out_channels": 4, **SIZES[size], **(V2 if v2 else V1)}
    torch.manual_seed(0)
    ours, theirs = UNet(**arguments), diffusers.UNet2DConditionModel.from_config(layouts.unet_config(arguments))
    for p in ours.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    _same_weights(ours, theirs, unet_keys(ours))
    return ours.train(), theirs.train()


AUTOENCODERS: dict[str, dict[str, Any]] = {  # Stable Diffusion's, narrower
    "81M": {"channels": 64, "multipliers": [1, 2, 4, 4], "blocks": 2},
    "toy": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "groups": 8},
}


def autoencoders(size: str) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Ours and diffusers', f8 (toy: f2), with the same weights."""
    arguments = {"latent_channels": 4, **AUTOENCODERS[size]}
    torch.manual_seed(0)
    ours, theirs = (
        AutoencoderKL(**arguments),
        diffusers.AutoencoderKL.from_config(layouts.autoencoder_config(arguments)),
    )
    _same_weights(ours, theirs, autoencoder_keys(ours))
    return ours.eval(), theirs.eval()


def _same_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    state = theirs.state_dict()
    theirs.load_state_dict({names[key]: value.view_as(state[names[key]]) for key, value in ours.state_dict().items()})


class TextToImage:
    """A training step as in diffusers' examples/text_to_image/train_text_to_image.py --use_ema, with latents and text given."""

    def __init__(self, unet: diffusers.UNet2DConditionModel) -> None:
        self.unet, self.scheduler = unet, diffusers.DDPMScheduler(**SD)
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 500))
        self.ema = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DConditionModel, model_config=unet.config)

    def step(self, latents: Tensor, text: Tensor) -> dict[str, float]:
        return measuring.timed(
            {
                "forward": lambda: self.forward(latents, text),
                "backward": lambda: self.loss.backward(),
                "clip": lambda: nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0),
                "optimizer": self.update,
                "EMA": lambda: self.ema.step(self.unet.parameters()),
            }
        )

    def forward(self, latents: Tensor, text: Tensor) -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),)).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        self.loss = nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")

    def update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
