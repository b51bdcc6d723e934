"""The peers' samplers beside ours. bench/solver_parity.py prints the same comparisons as a table."""

import pytest
import torch

from ldm.diffusion import solvers

peers = pytest.importorskip("peers")  # needs diffusers, a development dependency

PAIRS = [(case, network) for case in peers.CASES for network in case.networks]


@pytest.mark.parametrize(("case", "network"), PAIRS, ids=[f"{case.name}-{network}" for case, network in PAIRS])
@pytest.mark.parametrize("steps", [20, 50])
def test_diffusers(case: peers.Case, network: str, steps: int):
    if case.name == "DPM++ 2M SDE" and steps == 50:
        # no bar of float32: ours from a start moved by 1e-6 is as far from itself
        assert peers.against_diffusers(case, network, steps) < 5e-3
    else:
        assert peers.against_diffusers(case, network, steps) <= 1e-4


@pytest.mark.parametrize("name", peers.KARRAS_CASES)
def test_k_diffusion(name: str):
    assert peers.against_k_diffusion(name, 30, torch.float64) <= 1e-5


@pytest.mark.parametrize("solver", [solvers.euler, solvers.heun, solvers.dpmpp_2m, solvers.unipc, solvers.dpmpp_sde])
def test_eps_v_x0_and_flow_networks_of_one_denoiser_give_one_sample(solver):
    assert peers.between_parameterizations(solver, 30) <= 1e-4
