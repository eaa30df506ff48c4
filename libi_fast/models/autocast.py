"""Networks in half precision under ``torch.vmap``, where torch's own autocast has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Torch's own lists, as far as networks use them: what gains from half precision, and what must not be done in it.
LOWER: set[Any] = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
UPPER: set[Any] = {F.layer_norm, F.batch_norm, F.group_norm, F.instance_norm}


class Autocast(TorchFunctionMode):
    """Within it matrix products and convolutions of float32 tensors run in ``dtype`` and give it; norms run in float32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOWER or func in UPPER:
            wanted, other = (self.dtype, torch.float32) if func in LOWER else (torch.float32, self.dtype)

            def cast(value: Any) -> Any:
                return value.to(wanted) if isinstance(value, Tensor) and value.dtype == other else value

            args = [cast(a) for a in args]
            kwargs = {k: cast(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)
