"""What one GPU does with our networks: training steps rung by rung, memory, the largest batch, sampling. In 8 minutes.

    python bench/gpu.py [--minutes 8] [--out bench/results] [--only sd2_512 ...]
    python bench/gpu.py --toy --out /tmp/x      # any machine, seconds: does the script run?

It needs torch and this repository's torch-only rooms, nothing else and no network. Each rung adds one thing to the one before;
times are of CUDA events after a warm-up. OUT/<device>.json is written after each rung, so that what is cut short is not lost; a
rung that would not end in time is named as left out. Operations are counted on the meta device; MFU is over what the best
matrix product reaches here, and over the data sheet's peak.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_report import OUT_OF_MEMORY, Report, ceiling, seconds  # noqa: E402

from ldm.conditioning import Conditioning  # noqa: E402
from ldm.diffusion.denoiser import Denoiser  # noqa: E402
from ldm.diffusion.guidance import Guidance  # noqa: E402
from ldm.diffusion.loss import DenoisingLoss  # noqa: E402
from ldm.diffusion.parameterization import V  # noqa: E402
from ldm.diffusion.sampling import Sampling  # noqa: E402
from ldm.diffusion.schedules import ScaledLinear  # noqa: E402
from ldm.diffusion.solvers import euler  # noqa: E402
from ldm.diffusion.weighting import Classical  # noqa: E402
from ldm.interop.layouts import unet_config  # noqa: E402
from ldm.keyed_random import KeyedRandom  # noqa: E402
from ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from ldm.models.dit import DiT  # noqa: E402
from ldm.models.mmdit import MMDiT  # noqa: E402
from ldm.models.unet import UNet  # noqa: E402
from ldm.training.costs import flop_counter, peak_tflops  # noqa: E402

NETWORKS = {"ldm.models.unet.UNet": UNet, "ldm.models.dit.DiT": DiT, "ldm.models.mmdit.MMDiT": MMDiT,
            "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL}  # fmt: skip
RUNGS = ("eager", "sdpa", "channels_last", "fused", "compile", "cuda_graphs")
SLOW = ("compile", "cuda_graphs")


class Case(NamedTuple):
    """One network at one size. side: of the latents; length: of the text."""

    config: str
    changes: dict[str, Any]
    side: int
    length: int
    batch: int
    rungs: tuple[str, ...] = RUNGS


CASES = {  # the first matter most
    "sd2_512": Case("unet_sd2", {}, 64, 77, 32),
    "sd2_256": Case("unet_sd2", {}, 32, 77, 128, ("fused",)),
    "dit_xl_256": Case("dit_xl_2", {}, 32, 77, 64, ("sdpa", "fused", "compile", "cuda_graphs")),
    "mmdit_b_512": Case(
        "mmdit_sd3_medium", {"width": 768, "depth": 12, "heads": 12}, 64, 154, 32, ("sdpa", "fused", "compile")
    ),
    "sdxl_512": Case("unet_sdxl", {}, 64, 77, 8, ("fused", "compile")),
}
SMALL = {"channels": 32, "multipliers": [1, 2], "depths": [1, 0], "head_dim": 16, "context_channels": 16, "blocks": 1}
TOYS = {
    "sd2_512": Case("unet_sd2", SMALL, 8, 7, 2),
    "dit_xl_256": Case("dit_xl_2", {"width": 32, "depth": 2, "heads": 2, "context_channels": 16}, 8, 7, 2, ("sdpa", "fused")),
    "mmdit_b_512": Case("mmdit_sd3_medium", {"width": 32, "depth": 2, "heads": 2, "side": 8, "context_channels": 16,
                                             "vector_channels": 8}, 8, 7, 2, ("sdpa", "fused")),
    "sdxl_512": Case("unet_sdxl", {**SMALL, "vector_channels": 8}, 8, 7, 2, ("fused",)),
}  # fmt: skip


def arguments(group: str, name: str) -> dict[str, Any]:
    """The plain values of configs/model/<group>/<name>.yaml and of the file it extends; such files are flat. Without PyYAML,
    which GPU images may lack. What is nested (a normalization) is the class's default."""
    values: dict[str, Any] = {}
    for line in (ROOT / "configs" / "model" / group / f"{name}.yaml").read_text().splitlines():
        key, colon, text = line.partition(" #")[0].rstrip().partition(":")
        if not colon or not text.strip() or line[0] in " #":
            continue
        if key == "defaults":
            values |= arguments(group, text.strip(" []").partition(",")[0])
            continue
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text.strip()
    return values


def build(group: str, name: str, **changes: Any) -> nn.Module:
    given = arguments(group, name) | changes
    return NETWORKS[given.pop("_target_")](**given)


class Theirs(nn.Module):
    """diffusers' U-Net of the same sizes, called as ours."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel.from_config(unet_config(given))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        return self.unet(x, c_noise, cond.tokens).sample


class Data(NamedTuple):
    z: Tensor
    cond: Conditioning
    index: Tensor


def data(net: nn.Module, case: Case, batch: int, device: torch.device) -> Data:
    """Latents and text of the shapes that the network takes."""
    given = arguments("backbone", case.config) | case.changes
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, given["in_channels"], case.side, case.side, generator=generator)
    tokens = torch.randn(batch, case.length, given["context_channels"], generator=generator)
    vector = torch.randn(batch, given.get("vector_channels", 0), generator=generator)
    cond = Conditioning(tokens, torch.ones(batch, case.length, dtype=torch.bool), vector)
    return Data(
        z.to(device), Conditioning(*(p if p is None else p.to(device) for p in cond)), torch.arange(batch).to(device)
    )


class Training:
    """A step as the library takes it, with the levers of a rung."""

    def __init__(self, net: nn.Module, levers: set[str], device: torch.device, toy: bool) -> None:
        self.levers, self.device = levers, device
        self.denoiser = Denoiser(net, V())
        self.loss = DenoisingLoss(ScaledLinear(), Classical(V()))
        self.parameters = [*net.parameters()]
        fused = "fused" in levers
        graphs = "cuda_graphs" in levers
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, fused=fused, foreach=None if fused else False, capturable=graphs
        )
        self.average = [p.detach().clone() for p in self.parameters]
        if "channels_last" in levers:
            net.to(memory_format=torch.channels_last)
        if "compile" in levers:
            net.compile(backend="eager" if toy else "inductor")
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, data: Data) -> None:
        attention = nullcontext() if "sdpa" in self.levers else sdpa_kernel(SDPBackend.MATH)
        cache = "cuda_graphs" not in self.levers  # a graph must hold the casts that it replays
        with attention, torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache):
            loss = self.loss(self.denoiser, data.z, data.cond, KeyedRandom(0, data.index))[0].mean()
        loss.backward()
        fused = "fused" in self.levers
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=fused)
        self.optimizer.step()
        with torch.no_grad():
            if fused:
                torch._foreach_lerp_(self.average, self.parameters, 1e-4)
            else:
                for average, parameter in zip(self.average, self.parameters, strict=True):
                    average.lerp_(parameter, 1e-4)
        self.optimizer.zero_grad()

    def capture(self, data: Data) -> Callable[[], None]:
        """The whole step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(data)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(data)
        return self.graph.replay


def operations(case: Case) -> int:
    """Of one sample, forward and backward, counted on the meta device."""
    with torch.device("meta"):
        net = build("backbone", case.config, **case.changes)
    inputs = data(net, case, 1, torch.device("meta"))
    with flop_counter() as counter:
        net(inputs.z, torch.zeros(1, device="meta"), inputs.cond).sum().backward()
    return counter.get_total_flops()


class Bench:
    """All measurements, in the order of what they matter."""

    def __init__(self, report: Report, toy: bool) -> None:
        self.report, self.device, self.toy = report, report.device, toy
        self.peak = 0.0

    def environment(self) -> None:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.peak = ceiling(self.device, self.toy)
        self.report.results |= {
            "device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "toy": self.toy,
            "command": " ".join(["python", "bench/gpu.py", *sys.argv[1:]]), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            "matmul_tflops": self.peak, "data_sheet_tflops": peak_tflops(name),
        }  # fmt: skip
        self.report.write()

    def network(self, case: Case, peer: bool) -> nn.Module:
        with self.device:
            if peer:
                return Theirs(arguments("backbone", case.config) | case.changes).train()
            return build("backbone", case.config, **case.changes).train()

    def train(self, case: Case, rung: str, count: float, peer: bool, batch: int) -> dict[str, Any]:
        """One rung: all levers up to it."""
        levers = {*RUNGS[: RUNGS.index(rung) + 1]} - ({"channels_last"} if "unet" not in case.config else set())
        training = Training(self.network(case, peer), levers, self.device, self.toy)
        inputs = data(training.denoiser.backbone, case, batch, self.device)
        run = training.capture(inputs) if rung == "cuda_graphs" else lambda: training.step(inputs)
        step, steps = seconds(run, self.device, 3, 3.0)
        rate = batch / step
        row = {"batch": batch, "steps": steps, "step_ms": step * 1e3, "images_per_second": rate,
               "tflops": rate * count / 1e12, "mfu": rate * count / 1e12 / self.peak}  # fmt: skip
        sheet = self.report.results["data_sheet_tflops"]
        return row | ({"mfu_of_data_sheet": rate * count / 1e12 / sheet} if sheet else {})

    def count(self, name: str, case: Case) -> float:
        """Operations of one sample's step."""
        counts = self.report.results.setdefault("tflop_per_image", {})
        if name not in counts:
            counts[name] = operations(case) / 1e12
        return counts[name] * 1e12

    def ladder(self, name: str, case: Case, rungs: Sequence[str], peer: bool = False) -> None:
        """What does not fit into memory is tried with a quarter of the batch."""
        count = self.count(name, case)
        for rung in rungs:
            if (rung == "cuda_graphs" and self.device.type != "cuda") or (
                rung == "channels_last" and "unet" not in case.config
            ):
                continue
            for batch in (case.batch, case.batch // 4):
                shown = ("diffusers " if peer else "") + rung + (f" at {batch}" if batch != case.batch else "")
                row = self.report.measured(
                    name, shown, lambda rung=rung, batch=batch: self.train(case, rung, count, peer, batch)
                )
                if row.get("failed") != OUT_OF_MEMORY[0]:
                    break

    def largest(self, name: str, case: Case) -> None:
        """Doubles the batch until memory ends (toy: once)."""
        count, batch = self.count(name, case), case.batch
        for _ in range(1 if self.toy else 6):
            batch *= 2
            row = self.report.measured(
                name, f"batch {batch} fused", lambda batch=batch: self.train(case, "fused", count, False, batch)
            )
            if "images_per_second" not in row:
                break

    def sample(self, case: Case, compiled: bool) -> dict[str, Any]:
        """50 DDIM steps with guidance, and the decoder."""
        small = {"channels": 32, "multipliers": [1, 2]} if self.toy else {}
        with self.device:
            decoder = build("autoencoder", "kl_f8", **small).eval().to(memory_format=torch.channels_last)
        net = self.network(case, peer=False).eval().to(memory_format=torch.channels_last)
        if compiled:
            net.compile(backend="eager" if self.toy else "inductor")
        batch = min(case.batch, 16)
        inputs = data(net, case, batch, self.device)
        sampling = Sampling(euler, ScaledLinear(), Guidance(7.5), 2 if self.toy else 50)
        null = Conditioning(torch.zeros_like(inputs.cond.tokens), *inputs.cond[1:])
        denoiser = Denoiser(net, V())

        @torch.no_grad()
        def draw() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                z = sampling(denoiser, inputs.cond, null, KeyedRandom(0, inputs.index), inputs.z.shape[1:])
                return decoder.decode(z)

        whole, times = seconds(draw, self.device, 1, 4.0)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            decode = seconds(lambda: decoder.decode(inputs.z), self.device, 1, 1.0)[0]
        return {"batch": batch, "network_steps": sampling.steps, "times": times, "images_per_second": batch / whole,
                "decode_share": decode / whole}  # fmt: skip

    def run(self, only: list[str]) -> None:
        """What is quick and matters first; compilation, which takes a minute or two a network, after it."""
        cases = {name: case for name, case in (TOYS if self.toy else CASES).items() if not only or name in only}
        self.environment()
        (name, case), *others = cases.items()
        unet, peer = "unet" in case.config, self.peer()
        self.ladder(name, case, case.rungs)
        if unet:
            self.report.measured(name, "sampling", lambda: self.sample(case, compiled=False))
        if unet and peer:
            self.ladder(name, case, ("sdpa", "fused"), peer=True)
        for other in others:
            self.ladder(*other, [rung for rung in other[1].rungs if rung not in SLOW])
        if unet and peer:
            self.ladder(name, case, ("compile",), peer=True)
        self.largest(name, case)
        if unet:
            self.report.measured(name, "compiled sampling", lambda: self.sample(case, compiled=True))
        for other in others:
            self.ladder(*other, [rung for rung in other[1].rungs if rung in SLOW])

    def peer(self) -> bool:
        """Whether diffusers is here."""
        try:
            import diffusers
        except ModuleNotFoundError:
            self.report.results["diffusers"] = "not installed"
            return False
        self.report.results["diffusers"] = diffusers.__version__
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--toy", action="store_true", help="tiny networks, on any machine")
    parser.add_argument("--only", nargs="*", default=[], choices=[*CASES])
    given = parser.parse_args()
    if not given.toy and not torch.cuda.is_available():
        sys.exit("no CUDA device; --toy runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    slug = "".join(c if c.isalnum() else "_" for c in name.lower()) + ("_toy" if given.toy else "")
    Bench(Report(given.out / f"{slug}.json", device, given.minutes), given.toy).run(given.only)


if __name__ == "__main__":
    main()
