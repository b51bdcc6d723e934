"""Callbacks: the data position, the progress bar, and pictures during training."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import WandbLogger
from torchmetrics import Metric

from ldm.batch import Batch, to_uint8, to_unit
from ldm.data.accounts import Tally, write_report
from ldm.diffusion.loss import LEVELS
from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError
from ldm.evaluation.grid import picture_grid
from ldm.evaluation.latent_plot import latent_plot
from ldm.training.checkpointing import Checkpoint
from ldm.training.watchdog import Watchdog


class DataPosition(Callback):
    """Tells the data module what the training step consumed: the position that a checkpoint keeps is this one, not what
    the loader has fetched ahead. Stands before the checkpoint callback.

    With each logged step it writes run_dir/data_report.json and logs data/dropped/<reason>, both over all ranks.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        trainer.datamodule.consumed(batch)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:
            tally = self._report(trainer)
            counts = {f"data/dropped/{reason}": float(n) for reason, n in tally.dropped.items()}
            pl_module.log_dict(counts, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> Tally:
        tally = trainer.datamodule.tally()
        if trainer.is_global_zero:
            write_report(tally, self.run_dir)
        return tally


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, over the steps of the run: a run here is one endless epoch."""

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # to read a number is to wait for the GPU
            super()._update_metrics(trainer, pl_module)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'training':{len(self.validation_description)}}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Pictures(Callback):
    """Writes run_dir/<name>/step_<n>.png at each validation, under the averaged weights, and logs it to W&B.

    Args:
        run_dir: the run's directory.
        count: how many pictures, the first of the validation data.
        columns: of the grid.
    """

    name = "samples"

    def __init__(self, run_dir: str, count: int, columns: int = 8) -> None:
        self.folder, self.count, self.columns = Path(run_dir) / self.name, count, columns
        self.batches: list[Batch] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, _: int = 0
    ) -> None:
        have = sum(len(b["caption"]) for b in self.batches)
        if trainer.is_global_zero and have < self.count:
            self.batches.append(_head(batch, self.count - have))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, self.batches = self.batches, []
        if trainer.sanity_checking or not batches:
            return
        with trainer.precision_plugin.val_step_context():  # as fast as training
            grid = self.draw(pl_module, batches)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key=f"val/{self.name}", images=[grid], step=trainer.global_step - 1)

    def draw(self, module: LightningModule, batches: list[Batch]) -> Image.Image:
        raise NotImplementedError


class ReconstructionGrid(Pictures):
    """Held-out pictures, their reconstructions, and the error times four."""

    def draw(self, module: LightningModule, batches: list[Batch]) -> Image.Image:
        rows, captions = [], []
        for batch in batches:
            image = batch["image"].cpu()
            whole = module.reconstruct(batch["image"], batch["caption"], torch.arange(len(image)))
            reconstruction = to_uint8(whole).cpu()
            error = ((reconstruction.int() - image.int()).abs() * 4).clamp(max=255).to(torch.uint8)
            rows.append(torch.stack([image, reconstruction, error], dim=1).flatten(0, 1))
            captions += [text for _ in image for text in ("input", "reconstruction", "error x 4")]
        return picture_grid(torch.cat(rows), captions, self.columns * 3)


class LatentPlot(Pictures):
    """Histograms of the latents by channel, and of the codebook's use."""

    name = "latents"

    def draw(self, module: LightningModule, batches: list[Batch]) -> Image.Image:
        images = torch.cat([batch["image"] for batch in batches])
        posterior = module.autoencoder.encode(to_unit(images))
        return latent_plot(posterior.mean, module.autoencoder.code_counts(posterior))


class SampleGrid(Pictures):
    """Samples for held-out captions, always from the same noise.

    Args:
        sampling: solver, schedule, guidance and steps.
        seed: of the starting noise.
    """

    def __init__(self, run_dir: str, count: int, columns: int, sampling: Sampling, seed: int) -> None:
        super().__init__(run_dir, count, columns)
        self.sampling, self.seed = sampling, seed

    def draw(self, module: LightningModule, batches: list[Batch]) -> Image.Image:
        pictures, captions = [], []
        for batch in batches:
            pictures.append(to_uint8(module.sample_as(batch, self.sampling, self.seed)).cpu())
            captions += batch["caption"]
        return picture_grid(torch.cat(pictures), captions, self.columns)


class GenerationScores(SampleGrid):
    """Small scores at each validation, val/<metric>, of samples for held-out captions from the same noise.

    Args:
        metrics: as of evaluation; null ones are left out. Numbers of so few pictures compare within a run only.
        others: see SampleGrid.
    """

    def __init__(self, run_dir: str, count: int, sampling: Sampling, seed: int, metrics: Mapping[str, Metric]) -> None:
        super().__init__(run_dir, count, 1, sampling, seed)
        self.metrics = [metric for metric in metrics.values() if metric is not None]
        for metric in self.metrics:
            metric.distributed_available_fn = lambda: False  # only the first rank has pictures

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, self.batches = self.batches, []
        if trainer.sanity_checking or not batches:
            return
        for batch in batches:
            with trainer.precision_plugin.val_step_context():
                images = to_uint8(pl_module.sample_as(batch, self.sampling, self.seed)).cpu()
            for metric in self.metrics:
                metric.update(images, batch["caption"], batch["image"].cpu())
        for metric in self.metrics:
            values = {f"val/{name}": value for name, value in metric.compute().items() if not name.endswith("/ci95")}
            pl_module.log_dict(values, rank_zero_only=True)
            metric.reset()


class RawValidation(Callback):
    """The validation losses under the raw weights too, as val/raw/loss; Lightning's own pass sees the averaged ones.

    Costs a second pass over the validation data. Stands before the averages.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint) and callback.stopped:
                return  # it ends the run next
            if isinstance(callback, Watchdog):
                callback.on_validation_start(trainer, pl_module)  # this comes before its turn
        sums = torch.zeros(LEVELS + 1, dtype=torch.float64, device=pl_module.device)  # a rank may have no batch
        trainer.strategy.on_validation_start()  # gathers sharded weights
        limit = trainer.num_val_batches[0]
        with trainer.precision_plugin.val_step_context():
            for batch in islice(trainer.val_dataloaders, None if math.isinf(limit) else int(limit)):
                n = len(batch["index"])
                losses = pl_module.validation_losses(trainer.strategy.batch_to_device(batch))
                sums += n * torch.cat([losses, losses.new_ones(1)])
        trainer.strategy.on_validation_end()
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        self.values = pl_module.named((sums[:-1] / sums[-1]).float(), "val/raw")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.values)


class LossBySigma(Callback):
    """train/loss_sigma/<lowest>: with each logged step, the mean loss of its last micro-batch by noise level, over all
    ranks.

    A level without a sample is left out.

    Args:
        edges: ascending noise levels between the bins, sigma as in D(x; sigma).

    Raises:
        UserError: edges that do not ascend.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        if not edges or sorted(set(edges)) != list(edges):
            raise UserError(
                f"callbacks.loss_by_sigma.edges={list(edges)}; give ascending noise levels, as [0.1, 1, 10]"
            )
        self.edges = torch.tensor(edges, dtype=torch.float32)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.global_step % trainer.log_every_n_steps:
            return
        losses, sigma = outputs["losses"].double(), outputs["sigma"]
        bins = torch.bucketize(sigma, self.edges.to(sigma.device))
        sums = torch.zeros(2, len(self.edges) + 1, dtype=torch.float64, device=losses.device)
        sums.index_add_(1, bins, torch.stack([losses, torch.ones_like(losses)]))
        sums = trainer.strategy.reduce(sums, reduce_op="sum").cpu()
        names = ["below", *(f"{edge:g}" for edge in self.edges.tolist())]
        values = {
            f"train/loss_sigma/{name}": total / n for name, total, n in zip(names, *sums.tolist(), strict=True) if n
        }
        for logger in trainer.loggers:  # not through Lightning, which would repeat a level that has no sample now
            logger.log_metrics(values, trainer.global_step - 1)


def _head(batch: Any, n: int) -> Any:
    return {name: column[:n] for name, column in batch.items() if not name.startswith("dropped")}
