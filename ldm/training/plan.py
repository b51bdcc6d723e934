"""What a run will take, before it is run: parameters, memory, operations, time and money.

A step is done on tensors without data (torch's fake tensors), so a model of any size is planned on any machine, without weights.
"""

import ctypes
import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm import fetch
from ldm.batch import Batch
from ldm.data.latents import Stamp
from ldm.diffusion import schedules
from ldm.errors import UserError
from ldm.models.text import CachedText
from ldm.training.base import TrainingModule
from ldm.training.costs import PEAKS, Allocated, flop_counter, normalize_in_float32, peak_resident
from ldm.training.ema import trainable
from ldm.training.strategies import clip_norm, gradient_norm

_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
SIZES: dict[str, dict[str, Any]] = {  # of the text encoders that ldm.fetch knows, as their own configurations have them
    "clip_l": {**_CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
               "num_attention_heads": 12, "projection_dim": 768},
    "openclip_bigg": {**_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"},
    "openclip_h": {"embed_dim": 1024, "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024,
                                                   "heads": 16, "layers": 24}},
    "t5_xxl": {"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
               "num_heads": 64, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of the C library's malloc.h
_IS_RUN = ("ldm.config.first_stage", "ldm.config.autoencoder")


@dataclass(frozen=True)
class Setup:
    """How a run is spread, and what a device sees of it.

    Args:
        side: pixels of the pictures.
        samples: of a micro-batch on one device.
        cached: the batch holds latents' moments in place of pictures.
        averages: float32 copies of what is trained (EMA).
        precision: as trainer.precision: 32-true, bf16-mixed or 16-mixed.
        clip: as trainer.gradient_clip_val.
        parts: devices over which FSDP cuts what is trained; 1: none.
    """

    side: int
    samples: int
    cached: bool = False
    averages: int = 1
    precision: str = "32-true"
    clip: float | None = 1.0
    parts: int = 1


@dataclass(frozen=True)
class Estimate:
    """parameters: of each part of the model, how many are trained and frozen; memory: bytes of each kind on one device when
    the most is taken, which add up to the peak; operations: of one sample's training step: the denoiser's (of an autoencoder all)
    forward, all that is done backward, and what the first stage and the text encoder do forward."""

    parameters: dict[str, dict[str, int]]
    memory: dict[str, int]
    operations: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


def sized(model: Any, architecture: Callable[[str, str], dict[str, Any]], notes: list[str]) -> Any:
    """A model's config (plain data) with sizes wherever it names weights, so that it builds without any.

    Args:
        architecture: (a run's directory, the command that trains it) -> its autoencoder's config.
        notes: gets a line on everything that is left out or taken to be.

    Raises:
        UserError: a text encoder whose sizes are not known here.
    """
    if isinstance(model, list):
        return [sized(each, architecture, notes) for each in model]
    if not isinstance(model, dict):
        return model
    target = str(model.get("_target_"))
    if target.startswith("ldm.models.text_pretrained.") and model.get("weights"):
        model = {**model, "weights": None, "config": _text_sizes(model["weights"]), "tokenizer": None}
    elif target == "ldm.training.caching.cached_text":
        notes.append("the text encoder is not loaded: its work is in the latent cache")
        return {"_target_": "ldm.training.plan.text_of_cache", "folder": model["folder"]}
    elif target in _IS_RUN:
        network = architecture(model["run"], model["command"])
        if target == _IS_RUN[1]:
            return network
        return {"_target_": "ldm.training.plan.first_stage", "autoencoder": network}
    elif target == "ldm.models.perceptual.lpips" and not Path(model["weights"]).is_file():
        notes.append(f"the perceptual distance (VGG16, 14.7M frozen) is left out: {model['weights']} is not here")
        return None
    elif target == "ldm.training.adversarial.Adversary":
        model = {**model, "start": 0}  # the dearest steps are those with it
    return {key: sized(value, architecture, notes) for key, value in model.items()}


def _text_sizes(weights: str) -> dict[str, Any]:
    try:
        folder = fetch.local(weights)
    except UserError as error:
        if weights not in SIZES:
            raise UserError(
                f"the sizes of the text encoder {weights} are not known without its files: {error}"
            ) from None
        return SIZES[weights]
    if (folder / "open_clip_config.json").is_file():
        return json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    return json.loads((folder / "config.json").read_text())


def first_stage(autoencoder: Any) -> Any:
    """A first stage with the statistics of no latents."""
    from ldm.models.first_stage import FirstStage

    n = autoencoder.latent_channels
    return FirstStage(autoencoder, [0.0] * n, [1.0] * n)


def text_of_cache(folder: str) -> CachedText:
    """As caching.cached_text, by the sizes alone; without a cache there, those of Stable Diffusion v2."""
    text = Stamp.read(folder).text if (Path(folder) / "cache.json").is_file() else None
    length, width, vector = (text.length, text.width, text.pooled) if text else (77, 1024, 1024)
    return CachedText(torch.zeros(length, width), torch.ones(length).bool(), torch.zeros(vector), "")


class Job:
    """What a training run holds on one device, with the steps that Lightning would make of it."""

    def __init__(self, module: TrainingModule, setup: Setup, device: str = "cpu") -> None:
        self.module = module if device == "cpu" else module.to(device)  # fake ones cannot be moved
        self.setup, self.device = setup, device
        module.log = module.log_dict = lambda *_, **__: None  # there is no trainer
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.storage = [*trainable(module).values()]
        self.averages = [[p.to(torch.float32, copy=True) for p in self.storage] for _ in range(setup.averages)]
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._batch().items()}

    def _batch(self) -> Batch:
        """One of the right shapes, with all that any conditioner asks for."""
        n, side = self.setup.samples, self.setup.side
        batch: Any = Batch(index=torch.arange(n), caption=[""] * n, label=torch.zeros(n).long())
        if self.setup.cached:
            z, h, w = self.module.first_stage.latent_shape(side)
            batch["moments"] = torch.zeros(n, 2 * z, h, w, dtype=torch.float16)
        else:
            batch["image"] = torch.zeros(n, 3, side, side, dtype=torch.uint8)
            batch["depth"] = torch.rand(n, 1, side, side)
        text = getattr(getattr(self.module, "conditioner", None), "encoder", None)
        if isinstance(text, CachedText):
            names = ("text_tokens", "text_mask", "text_vector")
            batch |= {k: v.repeat(n, *[1] * (v.dim() - 1)) for k, v in zip(names, text([""]), strict=True)}
        return batch

    def forward(self) -> Tensor:
        dtype = _AUTOCAST.get(self.setup.precision)
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            out = self.module.training_step(self.batch, 0)
        return out["loss"] if isinstance(out, dict) else out

    def backward(self, loss: Tensor) -> None:
        """In Lightning's order: the gradients of the step before are there until now."""
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> None:
        if self.setup.clip:
            for part in self.module.clipped_apart():
                clip_norm(part, gradient_norm(part), self.setup.clip)
        self.optimizer.step()
        for average in self.averages:
            torch._foreach_lerp_(average, [p.float() for p in self.storage], 0.1)

    def parameters(self) -> dict[str, dict[str, int]]:
        counts = {}
        for name, part in self.module.named_children():
            sizes = {
                flag: sum(p.numel() for p in part.parameters() if p.requires_grad == flag) for flag in (True, False)
            }
            if any(sizes.values()):
                counts[name] = {"trained": sizes[True], "frozen": sizes[False]}
        return counts

    def memory(self) -> dict[str, int]:
        """Bytes of what stays from step to step."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        frozen = [*(p for p in self.module.parameters() if not p.requires_grad), *self.module.buffers()]
        state = [v for of in self.optimizer.state.values() for v in of.values() if isinstance(v, Tensor)]
        kinds: dict[str, list[Tensor]] = {
            "weights": trained,
            "gradients": trained,
            "optimizer": state,
            "averages": [each for average in self.averages for each in average],
            "frozen": frozen,
        }
        return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in kinds.items()}


def estimate(build: Callable[[], TrainingModule], setup: Setup, gpu: bool) -> Estimate:
    """Of one device.

    Args:
        build: makes the module; it is called where all tensors are fake.
        gpu: by the rules of a GPU's autocast, in place of the CPU's.

    Raises:
        UserError: what the step does depends on the values of data.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with Allocated():
                job = Job(build(), setup)
            if gpu and setup.precision in _AUTOCAST:
                normalize_in_float32(job.module)
            with flop_counter() as counter, Allocated() as allocated:
                inside = Inside(job.module, counter)
                loss = job.forward()
                forward, saved = counter.get_total_flops(), allocated.peak
                job.backward(loss)
                peak = allocated.peak  # what comes after has no activations
                job.update()
            memory = job.memory()
    except DynamicOutputShapeException as error:
        raise UserError(
            f"this model's step depends on the values of its data ({error.func}), and cannot be planned"
        ) from None
    finally:
        schedules._log_sigmas.cache_clear()  # a table of fake tensors must not outlive them
    # in the forward pass the gradients of the step before are still there
    working = max(saved + memory["gradients"], peak) - memory["gradients"]
    memory = {kind: size // (1 if kind == "frozen" else setup.parts) for kind, size in memory.items()}
    own = inside.operations or forward
    operations = {"forward": own, "backward": counter.get_total_flops() - forward, "other": forward - own}
    per_sample = {name: count / setup.samples for name, count in operations.items()}
    return Estimate(job.parameters(), memory | {"activations": working}, per_sample)


class Inside:
    """Counts the operations of a module's denoiser in its forward pass; none without one."""

    def __init__(self, module: TrainingModule, counter: FlopCounterMode) -> None:
        self.counter, self.operations = counter, 0
        if hasattr(module, "denoiser"):
            module.denoiser.register_forward_pre_hook(lambda *_: self._passed(-1))
            module.denoiser.register_forward_hook(lambda *_: self._passed(1))

    def _passed(self, sign: int) -> None:
        self.operations += sign * self.counter.get_total_flops()


def measure(build: Callable[[], TrainingModule], setup: Setup) -> int:
    """Bytes that two real steps take at most on this machine, with random weights: the estimate's check.

    On a GPU what torch allocates; else what this process grows by, without the holes that a heap gets (up to a tenth more).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _wake_up()
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)  # larger tensors leave no holes: what is freed goes back at once
    before = 0 if device == "cuda" else _resident()
    job = Job(build(), setup, device)
    for _ in range(2):
        job.backward(job.forward())
        job.update()
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident() - before


def _wake_up() -> None:
    """Has the libraries load what a step needs of them: some 40 MB that are no model's."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(8, 8))
    x = network(torch.zeros(2, 4, 8, 8))
    nn.functional.scaled_dot_product_attention(x, x, x).square().mean().backward()
    torch.optim.AdamW(network.parameters(), fused=True).step()


def _resident() -> int:
    """Bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def cost(
    operations: float, gpu: str, devices: int, samples: float, mfu: float, price: float | None
) -> dict[str, float | str]:
    """Time and money of training on so many samples.

    Args:
        operations: of one sample's step.
        gpu: one of PEAKS.
        mfu: share in (0, 1] of the GPU's peak that is reached.
        price: of one GPU and hour; None: no money.

    Raises:
        UserError
    """
    if gpu not in PEAKS:
        raise UserError(f"--gpu {gpu} is not known; there are: {', '.join(PEAKS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is no share of the peak; give a number in (0, 1], such as 0.3")
    rate = devices * PEAKS[gpu] * 1e12 * mfu / operations
    hours = samples / rate / 3600
    known: dict[str, float | str] = {
        "gpu": gpu, "devices": devices, "mfu": mfu, "samples": samples, "samples_per_second": rate, "hours": hours,
        "gpu_hours": hours * devices,
    }  # fmt: skip
    return known | ({} if price is None else {"money": hours * devices * price})
