"""What both stages share: the optimizer with its schedule, and checkpoints without frozen networks."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.strategies import clip_norm, gradient_norm, shard

OptimizerFactory = Callable[..., torch.optim.Optimizer]  # parameters -> optimizer


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes: names the weights of a frozen network."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """The state-dict entries of every submodule that has parameters and trains none of them, buffers included."""
    frozen: dict[str, Tensor] = {}
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            frozen |= {f"{name}.{key}": value for key, value in child.state_dict().items()}
        else:
            frozen |= {f"{name}.{key}": value for key, value in frozen_state(child).items()}
    return frozen


class TrainingModule(LightningModule):
    """A LightningModule whose checkpoints hold what it trains, and name what it does not by digest.

    Args:
        optimizer: makes the optimizer of the parameters that require grad.
        lr_schedule: step -> factor on its learning rate.
        seed: keys every random draw of a training step.
    """

    def __init__(self, optimizer: OptimizerFactory, lr_schedule: Callable[[int], float], seed: int) -> None:
        super().__init__()
        self.optimizer_factory, self.lr_schedule, self.seed = optimizer, lr_schedule, seed
        self._frozen_digest = ""
        self._norms: list[Tensor] | None = None

    def _digest(self, frozen: dict[str, Tensor]) -> str:
        """Taken once: a text encoder can be 19 GB."""
        self._frozen_digest = self._frozen_digest or digest(frozen)
        return self._frozen_digest

    def configure_model(self) -> None:
        """Frozen networks stand outside what is distributed: neither broadcast nor cut."""
        self._ddp_params_and_buffers_to_ignore = [*frozen_state(self)]  # torch's name for it
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Brings the optimizer's moments into their weights' memory layout: a checkpoint's may have another (channels_last has
        changed, or FSDP wrote it), and fused kernels would read the one as the other."""
        states = [state for optimizer in self.trainer.optimizers for state in optimizer.state.items()]
        for parameter, state in states:
            moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
            for name, moment in moments.items():
                if moment.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(moment)

    def on_train_batch_start(self, *_: Any) -> None:
        # the step that Lightning logs under: its own count is one too high after some resumes
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, **_: Any
    ) -> None:
        """By each part's own norm. Lightning's own clipping refuses fused optimizers under bf16, which scales nothing.

        Raises:
            UserError: under 16-mixed, whose gradients are still scaled here.
        """
        if gradient_clip_val and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "trainer.precision=16-mixed cannot clip gradients: use bf16-mixed, or gradient_clip_val=null"
            )
        norms, self._norms = self.gradient_norms(), None
        if gradient_clip_val:
            for part, norm in zip(self.clipped_apart(), norms, strict=True):
                clip_norm(part, norm, gradient_clip_val)

    def shared(self, value: Tensor) -> Tensor:
        """The mean over ranks, in the steps that are logged; in others nobody reads it, and no rank waits for another."""
        trainer = self._trainer
        if trainer is None or (trainer.global_step + 1) % trainer.log_every_n_steps:
            return value.detach()
        return trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")

    def gradient_norms(self) -> list[Tensor]:
        """Of each part in `clipped_apart`, (): measured once a step, by the search for faults, and used by clipping."""
        self._norms = self._norms or [gradient_norm(part) for part in self.clipped_apart()]
        return self._norms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("train/gradient_norm", self.gradient_norms()[0])

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """The trained parameters, in the parts whose gradients are clipped each by its own norm."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = frozen_state(self)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["frozen_digest"] = self._digest(frozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the frozen entries back, so that loading stays strict: any other missing key is an error."""
        frozen = frozen_state(self)
        if checkpoint["frozen_digest"] != self._digest(frozen):
            raise UserError(
                f"the checkpoint was trained on a frozen network with digest {checkpoint['frozen_digest'][:12]}, the one "
                f"here has {self._digest(frozen)[:12]}: bring the first stage (or text encoder) it was trained with back, or "
                "start a new run with another name="
            )
        checkpoint["state_dict"] |= frozen
