"""Matrix products in fp8 of frozen linear layers whose weights are stored in fp8.

Forward: ``y = (q_x s_x) (q_w s_w)^T + bias``. Every row of input and weight has a scale, its largest magnitude / 448,
and is rounded to float8 e4m3 (4 exponent bits, 3 mantissa bits, largest value 448; arXiv 2209.05433). The input is
rounded at every call, the weight once when it is loaded. torchao has the same arithmetic (``PerRow`` scales), but its
products have no gradient.

Backward: ``dL/dx = dL/dy (q_w s_w)``, the gradient of the dequantised weight; the rounding of the input counts as the
identity. The frozen weight has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignflow.devices import FP8
from alignflow.text import first_line
from generators.errors import GeneratorError
from generators.swap import blocks

LARGEST = 448.0
"""Largest value of float8 e4m3."""
SMALLEST = 1e-12
"""Least magnitude that a scale is computed from: a row of zeros has a scale too."""
MULTIPLE = 16
"""Kernels for fp8 need input and output features that are multiples of this."""


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x [M, K]`` in fp8.

    Returns:
        values ``[M, K]`` float8 e4m3 and scales ``[M, 1]`` float32. Their product is within ``2^-4 |x|`` or
        ``2^-10`` scales of ``x``, whichever is larger.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 values ``[M, K]`` times the scales of their rows ``[M, 1]``, as ``dtype``."""
    return (values.float() * scale).to(dtype)


def product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """``x [M, K]``, rounded to fp8, times the transposed weight ``values [N, K]``, ``scale [N, 1]``: ``[M, N]``
    bfloat16, the only type that row scales have on every card."""
    x_values, x_scale = rounded(x)
    told: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}  # as in torchao's forward passes
    return torch._scaled_mm(x_values, values.t(), scale_a=x_scale, scale_b=scale.t(), **told)


class Product(torch.autograd.Function):
    """:func:`product` of ``x [..., K]`` as ``[..., N]`` in the dtype of ``x``, with a gradient to ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """The product; the graph keeps the stored weight, which exists anyway, and no activations."""
        ctx.save_for_backward(values, scale)
        found = product(x.reshape(-1, x.shape[-1]), values, scale)
        return found.to(x.dtype).reshape(*x.shape[:-1], len(values))

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the dequantised weight."""
        values, scale = ctx.saved_tensors
        return given[0] @ dequantised(values, scale, given[0].dtype), None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer with a weight that torchao stores in fp8, and products in fp8 where the input has tokens.

    An input ``[N, K]`` has one row a sample (its time, its pooled text): such a product takes no time, and an error in
    it shifts every token alike, so its weight is dequantised.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear names it
        """``[..., K]`` -> ``[..., N]``, in the dtype of autocast where that is on."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        if input.ndim < 3:
            return super().forward(input)
        weight: Any = self.weight
        found: Tensor = Product.apply(input, weight.qdata, weight.scale)
        return found if self.bias is None else found + self.bias.to(found.dtype)


def use_products(network: nn.Module) -> list[str]:
    """Compute in fp8 in the repeated blocks of ``network``, whose weights torchao stores in fp8.

    Returns:
        names of the layers that do. Layers with features that are no multiple of :data:`MULTIPLE` are left alone.

    Raises:
        GeneratorError: the network names no blocks, or none of their layers can.
    """
    inside = {id(part) for block in blocks(network) for part in block.modules()}
    found = []
    for name, layer in list(network.named_modules()):
        if id(layer) in inside and _fits(layer):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, Fp8Linear(layer))  # type: ignore[arg-type]
            found.append(name)
    if not found:
        said = "no block has a linear layer that is stored in fp8, with features in multiples of 16"
        raise GeneratorError(f"memory.compute fp8: {type(network).__name__}: {said}; use memory.compute=dtype")
    return found


def _fits(layer: nn.Module) -> bool:
    values = getattr(getattr(layer, "weight", None), "qdata", None)
    if not isinstance(layer, nn.Linear) or not isinstance(values, Tensor) or values.dtype != torch.float8_e4m3fn:
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def require(device: torch.device) -> None:
    """Raise GeneratorError where ``device`` has no fp8 products, found out with a small one."""
    try:
        if device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            if torch.version.hip is None and found < FP8:
                name, (has, needs) = (
                    torch.cuda.get_device_name(device),
                    (".".join(map(str, one)) for one in (found, FP8)),
                )
                raise RuntimeError(f"{name} has compute capability {has}, and fp8 needs {needs} (Ada, Hopper or newer)")
        x = torch.linspace(-1, 1, 32 * 32, device=device).reshape(32, 32)
        gap = (product(x, *rounded(x)).float() - F.linear(x, x)).abs().max()
        if not float(gap) < 1:
            raise RuntimeError(f"a small product is wrong by {float(gap):.2g}")
    except (RuntimeError, NotImplementedError, TypeError) as error:
        said = first_line(error)
        raise GeneratorError(
            f"memory.compute fp8 does not work on {device}: {said}; use memory.compute=dtype"
        ) from None
