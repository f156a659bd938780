"""The kernels as operators of torch: a compiled graph calls them without looking inside.

Keys and ids are tensors there, so a new step is no new graph. Compiled code alone goes this way: an
eager call would pay for torch's dispatch.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Masked = Callable[..., Tensor]


def define(name: str, masked: Masked) -> Masked:
    """`masked(x, *tensors, option)` as `torch.ops.masklock.<name>`, with its gradient."""
    # Compiled code relies on the strides that the shapes alone foretell: contiguous ones.
    schema = torch.library.infer_schema(masked, mutates_args=())

    def run(x: Tensor, *rest: Any) -> Tensor:
        return masked(x.contiguous(), *rest).contiguous()

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.option = inputs[1:]
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        masked_gradient = operator(gradient, *tensors, ctx.option)
        return masked_gradient, *(None,) * (len(tensors) + 1)

    operator = torch.library.custom_op(f"masklock::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep)
    return cast(Masked, operator)
