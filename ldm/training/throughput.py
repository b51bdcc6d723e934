"""How fast a run is, and what it costs."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from torch.utils.hooks import RemovableHandle

from ldm.errors import UserError
from ldm.training.costs import flop_counter, peak_resident, peak_tflops


class Throughput(Callback):
    """Writes run_dir/throughput.jsonl, and to W&B, once in `trainer.log_every_n_steps` steps. Apart from metrics.jsonl, which
    is a function of the seed and the data alone.

    The times are the host's, between two logged steps, without validation: nothing waits for a GPU. The first batch is left
    out: it warms up, and its operations are counted. `mfu` is those operations (the first stage's and recomputed ones too)
    over what the device could do in bf16. `encode_percent`, on CPUs, is the share of the first stage and the conditioner.

    Args:
        run_dir: the run's directory.
        price_per_hour: of all devices together; None: no cost.
        peak_tflops: of one device; None: by its name, and without one that is known, no mfu.

    Raises:
        UserError: a number that is not above 0.
    """

    start = ended = waited = encoding = 0.0  # times and seconds since the last line, and its micro-batches
    batches = 0

    def __init__(self, run_dir: str, price_per_hour: float | None = None, peak_tflops: float | None = None) -> None:
        for name, value in (("price_per_hour", price_per_hour), ("peak_tflops", peak_tflops)):
            if value is not None and not value > 0:
                raise UserError(f"callbacks.throughput.{name}={value}; give a number above 0, or null")
        self.path = Path(run_dir) / "throughput.jsonl"
        self.price_per_hour, self.peak_tflops = price_per_hour, peak_tflops
        self.operations = 0  # of one micro-batch on one device
        self.warm = False  # the first batch is over
        self.hours = 0.0  # of training in this session
        self.hooks: list[RemovableHandle] = []
        self.encoders, self.encode_began = 0, 0.0  # how many are at work inside each other, and since when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.peak_tflops is None and pl_module.device.type == "cuda":
            self.peak_tflops = peak_tflops(torch.cuda.get_device_name(pl_module.device))
        first_stage = getattr(getattr(pl_module, "first_stage", None), "autoencoder", None)
        encoders = [getattr(first_stage, name, None) for name in ("encoder", "quant_conv")]
        for network in filter(None, (*encoders, getattr(pl_module, "conditioner", None))):
            if pl_module.device.type == "cpu":  # a GPU is still at work when its host goes on
                self.hooks += [
                    network.register_forward_pre_hook(self._encode),
                    network.register_forward_hook(self._encoded),
                ]
        self._begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()

    def _encode(self, *_: Any) -> None:
        self.encoders += 1
        self.encode_began = time.perf_counter() if self.encoders == 1 else self.encode_began

    def _encoded(self, *_: Any) -> None:
        self.encoders -= 1
        self.encoding += 0.0 if self.encoders else time.perf_counter() - self.encode_began

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.began = time.perf_counter()
        self.waited += self.began - self.ended
        if not self.warm and self.peak_tflops:
            self.counter = flop_counter()
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.warm:
            self.warm = True
            if self.peak_tflops:
                self.counter.__exit__(None, None, None)
                self.operations = self.counter.get_total_flops()
            return self._begin()
        self.ended, self.encoded_before = time.perf_counter(), self.encoding
        self.batches += 1
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer)
            self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = self.ended  # raw validation came before this callback's turn

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        away = time.perf_counter() - self.paused
        self.start, self.ended, self.encoding = self.start + away, self.ended + away, self.encoded_before

    def _begin(self) -> None:
        self.start = self.ended = time.perf_counter()
        self.waited, self.encoding, self.batches = 0.0, 0.0, 0  # seconds, seconds, micro-batches
        self.encoded_before = 0.0  # the last batch's end

    def _log(self, trainer: Trainer) -> None:
        seconds = self.ended - self.start
        steps = self.batches / trainer.accumulate_grad_batches
        samples = steps * trainer.datamodule.batch_size / seconds
        left = (trainer.max_steps - trainer.global_step) * seconds / steps / 3600
        self.hours += seconds / 3600
        values = {
            "samples_per_second": samples,
            "pixels_per_second": samples * trainer.datamodule.side**2,
            "data_wait_percent": 100 * self.waited / seconds,
            "step_percent": 100 * (1 - self.waited / seconds),
            **({"encode_percent": 100 * self.encoding / seconds} if self.hooks else {}),
            "peak_memory_gb": _peak_memory() / 1e9,
            "eta_hours": left,
        }
        if self.operations and self.peak_tflops:
            values["mfu"] = self.operations * self.batches / seconds / (self.peak_tflops * 1e12)
        if self.price_per_hour is not None:
            values |= {"cost": self.hours * self.price_per_hour, "cost_left": left * self.price_per_hour}
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_metrics({f"throughput/{name}": v for name, v in values.items()}, trainer.global_step - 1)


def _peak_memory() -> int:
    """Bytes: allocated on the GPU, or else resident in this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
