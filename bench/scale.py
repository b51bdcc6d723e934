"""Many GPUs: what two real ranks cost here, and a paper model of 8 to 1,024.

    OMP_NUM_THREADS=1 python bench/scale.py     # weak scaling over gloo: 1 rank, 2 apart, 2 together
    python bench/scale.py --model               # the tables of bench/SCALE.md

The ranks are processes under Lightning and our DDP strategy, as train.py starts them; each has one thread and the same batch.
Bytes on the wire are what the ranks hand to the kernel (wchar of /proc/self/io), so nothing else on the machine counts.
"""

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import measuring
import torch
from torch import nn

from ldm.training.costs import PEAKS, flop_counter

# --- the model: Stable Diffusion v2 at 512 px, global batch 2048, latents and text out of a cache

PARAMETERS = 865_910_724
BATCH = 2048
GPUS = (8, 64, 256, 1024)
STEPS = 850_000
RESULTS = measuring.ROOT / "bench" / "results"


class Cluster(NamedTuple):
    """Assumptions, each with where it comes from.

    images_per_second: of one GPU that waits for nothing, at 512 px. A100: MosaicML's README, 290 on 8; H100 and H200: MLPerf
        training v4.0 to v5.0, per GPU (bench/gpu.py's own figure takes their place where it was run).
    bus_gb: bandwidth of NCCL's all-reduce over nodes of 8, GB/s: 0.8 of eight network cards of 25 or 50 GB/s.
    gpu_mtbf_hours: of one GPU: 419 unexpected interruptions of 16,384 H100 in 54 days (Dubey et al. 2024, table 5).
    restart_seconds: from a failure to the next step: requeue, start, read the checkpoint.
    half_batch: samples that a step's fixed cost is worth: MosaicML's loss from 36.25 to 35.86 images/s per GPU, from 256 to 16
        samples a GPU, taken as if all of it were this.
    latency: seconds of one hop of an all-reduce between nodes.
    jitter: standard deviation of a rank's step over its mean; the slowest of N is about sqrt(2 ln N) of them late.
    checkpoint_gb: GB/s that a checkpoint is written with, while training waits.
    """

    images_per_second: float
    bus_gb: float
    gpu_mtbf_hours: float = 16_384 * 54 * 24 / 419
    restart_seconds: float = 300.0
    half_batch: float = 0.175
    latency: float = 1e-5
    jitter: float = 0.005
    checkpoint_gb: float = 2.0


CLUSTERS = {"A100": Cluster(36.25, 160.0), "H100": Cluster(126.0, 320.0), "H200": Cluster(150.0, 320.0)}


def measured_rate(name: str) -> float | None:
    """Images a second of the best rung that bench/gpu.py found for such a GPU at 512 px."""
    for path in sorted(RESULTS.glob(f"*{name.lower()}*.json")):
        found = json.loads(path.read_text())
        rows = [row for rung, row in found["cases"].get("sd2_512", {}).items() if "diffusers" not in rung]
        rates = [row["images_per_second"] for row in rows if "tflops" in row]
        if rates and not found["toy"]:
            return max(rates)
    return None


def lost(interval: float, checkpoint: float, mtbf: float, restart: float) -> float:
    """Share of the time that goes into checkpoints, into work done again, and into restarts."""
    return checkpoint / interval + interval / (2 * mtbf) + restart / mtbf


def goodput(gpus: int, cluster: Cluster, checkpoint_seconds: float) -> dict[str, float]:
    """The best interval between checkpoints, sqrt(2 C M) (Young 1974; Daly 2006), and what is left then."""
    mtbf = cluster.gpu_mtbf_hours * 3600 / gpus
    interval = math.sqrt(2 * checkpoint_seconds * mtbf)
    share = 1 - lost(interval, checkpoint_seconds, mtbf, cluster.restart_seconds)
    return {"mtbf_seconds": mtbf, "interval_seconds": interval, "goodput": share}


def model(name: str) -> list[dict[str, float]]:
    cluster = CLUSTERS[name]
    rate = measured_rate(name) or cluster.images_per_second
    rows = []
    for gpus in GPUS:
        own = BATCH / gpus
        compute = (own + cluster.half_batch) / rate
        volume = 2 * (1 - 1 / gpus) * 4 * PARAMETERS / 1e9  # GB that each GPU sends, float32
        buckets = 4 * PARAMETERS / 25e6  # DDP's
        reduce = volume / cluster.bus_gb + buckets * 2 * math.log2(max(gpus // 8, 1)) * cluster.latency
        hidden = compute * 2 / 3  # the backward pass; the last bucket cannot hide
        exposed = max(reduce - hidden, reduce / buckets)
        late = compute * cluster.jitter * math.sqrt(2 * math.log(gpus))
        step = compute + exposed + late
        good = goodput(gpus, cluster, 16 * PARAMETERS / 1e9 / cluster.checkpoint_gb)
        hours = STEPS * step / good["goodput"] / 3600
        rows.append(
            {
                "gpus": gpus, "per_gpu": own, "step_seconds": step, "images_per_second": BATCH / step,
                "efficiency": BATCH / step / (gpus * rate), "all_reduce_gb": volume, "reduce_seconds": reduce,
                "exposed_seconds": exposed, **good, "hours": hours, "gpu_hours": hours * gpus,
            }
        )  # fmt: skip
    return rows


def encoders() -> dict[str, float]:
    """10^12 operations of encoding a picture of 256 and of 512 px with KL-f8."""
    found = {}
    for side in (256, 512):
        with torch.device("meta"):
            network = gpu.build("autoencoder", "kl_f8")
        with flop_counter() as counter, torch.no_grad():
            network.quant_conv(network.encoder(torch.empty(1, 3, side, side, device="meta")))
        found[f"{side} px"] = counter.get_total_flops() / 1e12
    return found


def print_model() -> None:
    for name in CLUSTERS:
        rate = measured_rate(name)
        known = f"measured by bench/gpu.py: {rate:.1f}" if rate else f"published: {CLUSTERS[name].images_per_second:g}"
        print(f"### {name}, images/s of one GPU {known}\n")
        head = ["GPUs", "a GPU's batch", "step s", "images/s", "of linear", "sent GB", "all-reduce s", "not hidden s",
                "fails every h", "checkpoint every min", "goodput", "850,000 steps, days", "GPU hours"]  # fmt: skip
        rows = [
            [f"{r['gpus']:,}", f"{r['per_gpu']:g}", f"{r['step_seconds']:.3f}", f"{r['images_per_second']:,.0f}",
             f"{r['efficiency']:.1%}", f"{r['all_reduce_gb']:.2f}", f"{r['reduce_seconds']:.3f}", f"{r['exposed_seconds']:.4f}",
             f"{r['mtbf_seconds'] / 3600:,.0f}", f"{r['interval_seconds'] / 60:.0f}", f"{r['goodput']:.2%}",
             f"{r['hours'] / 24:.1f}", f"{r['gpu_hours']:,.0f}"]
            for r in model(name)
        ]  # fmt: skip
        print(measuring.table(head, rows))
    print_loading()
    print_plan()


SAMPLE_BYTES = {"JPEG, 512 px": 60_000, "latents, 512 px": 2 * 8 * 64 * 64, "latents, 256 px": 2 * 8 * 32 * 32,
                "text, 77 x 1024": 2 * 77 * 1024}  # fmt: skip
PER_CORE = {"JPEG, 512 px": 300.0, "latents, 512 px": 14_485 / 4}  # samples a second, by RESULTS.md: see SCALE.md


def print_loading() -> None:
    print("### What has to be read (H100)\n")
    rows = []
    for row in model("H100"):
        rate = row["images_per_second"] / row["gpus"] * 8
        rows.append(
            [f"{row['gpus']:,}", f"{row['images_per_second']:,.0f}", f"{rate:,.0f}"]
            + [
                f"{rate * SAMPLE_BYTES[kind] / 1e6:,.0f}"
                for kind in ("latents, 512 px", "text, 77 x 1024", "JPEG, 512 px")
            ]
            + [f"{rate / PER_CORE[kind]:.1f}" for kind in ("latents, 512 px", "JPEG, 512 px")]
        )
    head = ["GPUs", "samples/s", "a node's samples/s", "latents MB/s a node", "+ text MB/s", "JPEG MB/s",
            "cores a node for latents", "for JPEG"]  # fmt: skip
    print(measuring.table(head, rows))


def print_plan(samples: float = 2e9, shard: int = 10_000, mfu: float = 0.3) -> None:
    print(f"### {samples / 1e9:g} billion pictures\n")
    rows = [
        [
            kind,
            f"{size / 1e3:,.0f}",
            f"{samples * size / 1e12:,.0f}",
            f"{samples / shard:,.0f}",
            f"{shard * size / 1e6:,.0f}",
        ]
        for kind, size in SAMPLE_BYTES.items()
    ]
    print(measuring.table(["kept", "kB a sample", "TB", f"shards of {shard:,}", "MB a shard"], rows))
    rows = [
        [f"KL-f8, {side}", f"{count:.2f}"]
        + [f"{samples * count / (PEAKS[name] * mfu) / 3600:,.0f}" for name in ("A100", "H100")]
        for side, count in encoders().items()
    ]
    print(measuring.table(["encoded once", "10^12 operations", "A100 hours", "H100 hours"], rows))


# --- two real ranks


def network(toy: bool) -> nn.Module:
    return gpu.build("backbone", "unet_sd2", **(gpu.SMALL | ({} if toy else {"channels": 128})))


def train(steps: int, toy: bool) -> None:
    """One rank: prints seconds and bytes of its steps as JSON."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from ldm.diffusion.loss import DenoisingLoss
    from ldm.diffusion.parameterization import V
    from ldm.diffusion.schedules import LogNormal
    from ldm.diffusion.weighting import Classical
    from ldm.models.conditioners import TextConditioner
    from ldm.models.first_stage import FirstStage
    from ldm.models.text import CachedText
    from ldm.training import session
    from ldm.training.latent_diffusion import LatentDiffusionModule
    from ldm.training.optim import Warmup
    from ldm.training.strategies import ddp

    batch, side, width = (2, 8, 16) if toy else (8, 16, 16)
    seen: list[tuple[float, int]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            written = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))
            seen.append((time.perf_counter(), int(written.split()[1])))

    sample = {"moments": torch.zeros(8, side, side), "text_tokens": torch.randn(7, width), "text_vector": torch.zeros(0),
              "text_mask": torch.ones(7, dtype=torch.bool)}  # fmt: skip
    session.quiet()
    torch.manual_seed(0)
    null = torch.zeros(7, width), torch.ones(7, dtype=torch.bool), torch.zeros(0)
    module = LatentDiffusionModule(
        FirstStage(nn.Identity(), [0.0] * 4, [1.0] * 4), TextConditioner(CachedText(*null, digest="")), network(toy), V(),
        DenoisingLoss(LogNormal(), Classical(V())), 0.1, partial(torch.optim.AdamW, lr=1e-4, fused=True), Warmup(1), 0,
    )  # fmt: skip
    world = int(os.environ.get("WORLD", 1))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=False, callbacks=[Watch()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        strategy=ddp(60, process_group_backend="gloo", gradient_as_bucket_view=True) if world > 1 else "auto",
    )  # fmt: skip
    trainer.fit(module, DataLoader([{**sample, "index": i} for i in range(batch * (steps + 1))], batch))
    later = seen[steps // 3 :]  # the first build the buckets
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(later)]
    gradient = sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    print(json.dumps({"seconds": [p[0] for p in pairs], "bytes": statistics.median(p[1] for p in pairs),
                      "gradient": gradient, "batch": batch}))  # fmt: skip


def start(world: int, rank: int, port: int, steps: int, toy: bool) -> subprocess.Popen[str]:
    environment = os.environ | {"WORLD": str(world), "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    arguments = ["--rank", "--steps", str(steps), *(["--toy"] if toy else [])]
    return subprocess.Popen([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def ranks(world: int, copies: int, steps: int, toy: bool) -> dict[str, float]:
    """So many ranks together, or copies of one rank beside each other that know nothing of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(world, i, port, steps, toy) for i in range(max(world, copies))]
    answers = [child.communicate(timeout=400)[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a rank failed")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    step = statistics.median(max(each) for each in zip(*(one["seconds"] for one in found), strict=True))
    return {
        "ranks": world, "copies": copies, "step_seconds": step, "samples_per_second": len(found) * found[0]["batch"] / step,
        "wire_bytes_per_step": sum(one["bytes"] for one in found), "gradient_bytes": found[0]["gradient"],
    }  # fmt: skip


def measure(steps: int, toy: bool) -> None:
    cases = {"1 rank": (1, 1), "2 apart, one each": (1, 2), "2 ranks, DDP over gloo": (2, 1)}
    rows = {name: ranks(*case, steps, toy) for name, case in cases.items()}
    one = rows["1 rank"]["samples_per_second"]
    print(measuring.environment("pytorch-lightning", threads=1))
    table = [
        [name, f"{row['step_seconds'] * 1e3:.0f}", f"{row['samples_per_second']:.1f}",
         f"{row['samples_per_second'] / one / (2 if name[0] == '2' else 1):.2f}", f"{row['wire_bytes_per_step'] / 1e6:.2f}",
         f"{row['gradient_bytes'] / 1e6:.2f}"]
        for name, row in rows.items()
    ]  # fmt: skip
    print(measuring.table(["", "step ms", "samples/s", "of linear", "sent MB/step", "gradient MB"], table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="print the tables of SCALE.md")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", action="store_true", help="of 1 rank and of 2, as the last line")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        torch.set_num_threads(1)
        train(given.steps, given.toy)
    elif given.model:
        print_model()
    elif given.json:
        print(json.dumps([ranks(world, 1, given.steps, given.toy) for world in (1, 2)]))
    else:
        measure(given.steps, given.toy)


if __name__ == "__main__":
    main()
