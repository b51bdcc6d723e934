"""Prints, as Markdown, how far our solvers are from their peers' and from the exact solution.

    python bench/solver_parity.py

Needs the development dependencies, and k-diffusion: pip install --no-deps k-diffusion==0.1.1.post1
"""

import math
from functools import partial
from importlib.metadata import version

import peers
import torch
from torch import Tensor

from ldm.diffusion import solvers
from ldm.diffusion.schedules import Karras

STD, MEAN = 0.5, 0.7


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(MEAN, STD²)."""
    return (sigma**2 * MEAN + STD**2 * x) / (STD**2 + sigma**2)


def measured_order(solver: solvers.Solver) -> tuple[float, float]:
    """(order, root mean square error at 64 steps) on Gaussian data, from σ = 80 to 0.002, float64."""
    schedule, steps, errors = Karras(), (64, 128, 256, 512), []
    generator = torch.Generator().manual_seed(0)
    x = MEAN + math.sqrt(STD**2 + 80**2) * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((STD**2 + 0.002**2) / (STD**2 + 80**2))
    for n in steps:
        sigmas = schedule(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        errors.append((solver(gaussian, x, sigmas) - exact).square().mean().sqrt().item())
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0]), errors[0]


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, diffusers {version('diffusers')}, k-diffusion {version('k-diffusion')}, CPU\n")
    print("### diffusers: largest difference of x0, float32, Stable Diffusion's schedule, leading grid\n")
    print("| scheduler | network | 20 steps | 50 steps | remark |\n|---|---|---|---|---|")
    for case in peers.CASES:
        for network in case.networks:
            near, far = (peers.against_diffusers(case, network, steps) for steps in (20, 50))
            print(f"| {case.name} | {network} | {near:.1e} | {far:.1e} | {case.note} |")
    print("\n### k-diffusion: largest difference of x0, 30 steps of Karras' grid from σ = 14.6\n")
    print("| sampler | float64 | float32 |\n|---|---|---|")
    for name in peers.KARRAS_CASES:
        double, single = (peers.against_k_diffusion(name, 30, dtype) for dtype in (torch.float64, torch.float32))
        print(f"| {name} | {double:.1e} | {single:.1e} |")
    print("\n### ε, v, x0 and flow networks of one denoiser: largest difference of x0, 30 steps, float32\n")
    print("| solver | difference |\n|---|---|")
    for solver in (solvers.euler, solvers.heun, solvers.dpmpp_2m, solvers.unipc, solvers.dpmpp_sde):
        print(f"| {solver.__name__} | {peers.between_parameterizations(solver, 30):.1e} |")
    print("\n### Gaussian data: measured order, and error at 64 steps\n")
    print("| solver | order | error |\n|---|---|---|")
    named = {
        "euler (DDIM)": solvers.euler,
        "heun": solvers.heun,
        "dpmpp_2s": solvers.dpmpp_2s,
        "dpmpp_2m": solvers.dpmpp_2m,
        "dpmpp_3m": solvers.dpmpp_3m,
        "dpmpp_3m as in k-diffusion and diffusers": partial(solvers.dpmpp_3m, curvature=1.0),
        "unipc, order 2": solvers.unipc,
        "unipc, order 3": partial(solvers.unipc, order=3),
    }
    for name, solver in named.items():
        order, error = measured_order(solver)
        print(f"| {name} | {order:.2f} | {error:.1e} |")


if __name__ == "__main__":
    main()
