"""What a step costs, counted from shapes: operations, and bytes of tensors. torch alone."""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

PEAKS = {  # 10^12 dense bf16 operations a second, by the makers' data sheets; the first name that fits
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(out, q, k, v)


_ATTENTION_ON_CPU = {  # torch counts only the kernels of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def peak_tflops(device: str) -> float | None:
    """Of a device's name, such as "NVIDIA H100 80GB HBM3"; None: it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


class _NoModules:
    """In place of torch's record of which module an operation is of: its hooks refuse autograd.grad, which an adversary's
    adaptive weight is made by."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """torch's counter of operations (a multiplication and an addition are two), attention on CPUs counted too."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class Allocated(TorchDispatchMode):
    """Follows the storages that operations make inside the block, on fake tensors.

    `live`: bytes alive now, and `peak`: the most there were. Tensors made before the block, and the kernels' own work space,
    are not counted. Asked for a value, such as whether all are finite, it says yes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        tree_map_only(Tensor, lambda given: self._follow(given, 0), (args, kwargs))  # it may come back as an output
        return tree_map_only(
            Tensor, lambda made: self._follow(made, made.untyped_storage().nbytes()), func(*args, **(kwargs or {}))
        )

    def _follow(self, tensor: Tensor, size: int) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)
        return tensor

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def normalize_in_float32(module: nn.Module) -> None:
    """What a GPU's autocast does and the CPU's does not, which counts in what is kept for the backward pass."""
    for each in module.modules():
        if isinstance(each, (nn.GroupNorm, nn.LayerNorm)):
            each.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def peak_resident() -> int:
    """The most bytes that this process has had in memory; getrusage's figure begins with that of the process which started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
