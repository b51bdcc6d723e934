"""Distribution, chosen by configs/trainer: DDP; FSDP and HSDP through Lightning's ModelParallelStrategy (torch's FSDP2).

A checkpoint is the same whichever wrote it: whole tensors under the module's own names, in one file.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ldm.errors import UserError


def ddp(timeout: float, accumulate: int = 1, **options: Any) -> DDPStrategy:
    """Lightning's DDP, with a static graph unless micro-batches accumulate: in torch the one excludes the other.

    Args:
        timeout: seconds after which a rank that waits for another gives up.
        accumulate: micro-batches of one optimizer step.
        options: of DDPStrategy and of torch's DistributedDataParallel.
    """
    return DDPStrategy(timeout=timedelta(seconds=timeout), static_graph=accumulate == 1, **options)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def joined(mine: Tensor, like: Tensor) -> Tensor:
    """The whole of what each rank holds a part of, cut as `like` is. All ranks call it together."""
    if not isinstance(like, DTensor):
        return mine
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(mine, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor().cpu()


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Of all their gradients as one vector, (); of sharded ones with one all-reduce, where torch has one for each."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([local(gradient) for gradient in gradients]).to(parameters[0].device)
    if not gradients or not isinstance(gradients[0], DTensor):
        return norm
    mesh, square = gradients[0].device_mesh, norm.square()
    distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # the ranks that share a copy
    return square.sqrt()


def clip_norm(parameters: list[nn.Parameter], norm: Tensor, limit: float) -> None:
    """torch's clip_grad_norm_, where the norm is known."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What stands in a network's outermost lists: a U-Net's stages, a transformer's blocks."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Cuts what is trained into parts, one a rank; frozen networks stay whole.

    The denoiser's blocks are gathered one at a time, all else before the step: a method of a conditioner or an autoencoder may
    use any weight. Under bf16-mixed blocks are gathered in bfloat16, half the bytes of what autocast would make of them.

    Args:
        mesh: (copies of the model, parts of each).

    Raises:
        UserError: a trained scalar, which cannot be cut.
    """
    if isinstance(module, FSDPModule):  # Lightning may ask again
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.ndim == 0:
            raise UserError(f"{name} is a scalar that is trained, which FSDP cannot cut: use trainer=ddp")
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    data = mesh if mesh.size(0) > 1 else mesh["tensor_parallel"]
    own, half = MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mixed = getattr(module._trainer, "precision", None) == "bf16-mixed"
    for each in (*blocks(getattr(module, "denoiser", nn.Module())), module):
        if any(parameter.requires_grad for parameter in each.parameters()):
            policy = half if mixed and each is not module else own
            fully_shard(each, mesh=data, mp_policy=policy, ignored_params=frozen)
            each.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # gloo knows no average
    register_fsdp_forward_method(module, "training_step")


class FullySharded(ModelParallelStrategy):
    """FSDP, and HSDP: parameters, gradients, optimizer and averages are cut over the ranks (see TrainingModule).

    Validation works on gathered weights: ranks have different numbers of batches, and rank 0 alone draws pictures.

    Args:
        replicas: copies of the model, each cut over world / replicas ranks in a row: 1 is FSDP; more is HSDP, whose gathers
            stay within a copy. None: one a node.
        timeout: seconds after which a rank that waits for another gives up.

    Raises:
        UserError: the ranks cannot be split into that many copies.
    """

    lightning_restore_optimizer = True

    def __init__(self, replicas: int | None, timeout: float) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))
        self.replicas = replicas

    def setup_environment(self) -> None:
        world, copies = self.num_nodes * self.num_processes, self.replicas or self.num_nodes
        if world % copies:
            raise UserError(f"trainer.strategy.replicas={copies} does not divide the {world} ranks")
        self._data_parallel_size, self._tensor_parallel_size = copies, world // copies
        super().setup_environment()

    def on_validation_start(self) -> None:
        root, *others = self._sharded()
        root.set_reshard_after_forward(False)
        for module in (root, *others):
            module.unshard()

    def on_validation_end(self) -> None:
        root, *others = self._sharded()
        for module in (root, *others):
            module.reshard()
        root.set_reshard_after_forward(True)
        root.set_reshard_after_forward(False, recurse=False)  # it is needed again at once, by the backward pass

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]

    def _joined(self, value: Any) -> Any:
        """On rank 0 the whole tensor; the others let go of it."""
        whole = joined(value.to_local(), value) if isinstance(value, DTensor) else value
        return whole if whole is value or self.is_global_zero else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return tree_map(self._joined, dict(self.lightning_module.state_dict()))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return tree_map(self._joined, super(ModelParallelStrategy, self).optimizer_state(optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {name: part(value, own.get(name, value)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                i: {
                    key: part(value, parameters[i]) if _like(value, parameters[i]) else value
                    for key, value in of.items()
                }
                for i, of in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
