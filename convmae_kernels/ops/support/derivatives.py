"""Derivatives of ops: of a convolution with ops for its two gradients, and by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Derivatives = Callable[[Any], tuple[Callable, Callable]]


def derivatives_of_convolution(name: str) -> tuple[Derivatives, Derivatives, Derivatives]:
    """What `register` takes as derivatives of the ops `name`, `name_input_grad` and
    `name_weight_grad`.

    They are closed under differentiation, being linear in each of their tensors. With w the weight,
    b the bias and g a gradient of the output: `conv(x, w, b)` has the gradients `input_grad(g, w)`
    and `weight_grad(g, x)`; `input_grad(g, w)`, given a gradient u, has `conv(u, w)` in g and
    `weight_grad(g, u)` in w; `weight_grad(g, x)`, given the gradients (v, c) of its two outputs,
    has `conv(x, v, c)` in g and `input_grad(g, v)` in x.

    Args:
        name: of ops `name(x, weight, bias, neighbours, *shape)`,
            `name_input_grad(grad, weight, neighbours, *shape)` and
            `name_weight_grad(grad, x, neighbours, kernel, *shape)`.
    """

    input_grad_name, weight_grad_name = f"{name}_input_grad", f"{name}_weight_grad"

    def of_convolution(ops: Any) -> tuple[Callable, Callable]:
        def setup_context(ctx, inputs, output):
            x, weight, bias, neighbours, *ctx.shape = inputs
            ctx.has_bias = bias is not None
            ctx.save_for_backward(x, weight, neighbours)

        def backward(ctx, grad):
            x, weight, neighbours = ctx.saved_tensors
            input_grad, weight_grad = (getattr(ops, n) for n in (input_grad_name, weight_grad_name))
            grad_x = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_x = input_grad(grad, weight, neighbours, *ctx.shape)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                kernel = weight.shape[2:]
                grad_weight, grad_bias = weight_grad(grad, x, neighbours, kernel, *ctx.shape)
            grad_bias = grad_bias if ctx.has_bias else None
            return grad_x, grad_weight, grad_bias, None, *(None for _ in ctx.shape)

        return backward, setup_context

    def of_input_grad(ops: Any) -> tuple[Callable, Callable]:
        def setup_context(ctx, inputs, output):
            grad, weight, neighbours, *ctx.shape = inputs
            ctx.save_for_backward(grad, weight, neighbours)

        def backward(ctx, grad_x):
            grad, weight, neighbours = ctx.saved_tensors
            convolution, weight_grad = (getattr(ops, n) for n in (name, weight_grad_name))
            grad_grad = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_grad = convolution(grad_x, weight, None, neighbours, *ctx.shape)
            if ctx.needs_input_grad[1]:
                kernel = weight.shape[2:]
                grad_weight, _ = weight_grad(grad, grad_x, neighbours, kernel, *ctx.shape)
            return grad_grad, grad_weight, None, *(None for _ in ctx.shape)

        return backward, setup_context

    def of_weight_grad(ops: Any) -> tuple[Callable, Callable]:
        def setup_context(ctx, inputs, output):
            grad, x, neighbours, _, *ctx.shape = inputs
            ctx.save_for_backward(grad, x, neighbours)

        def backward(ctx, grad_weight, grad_bias):
            grad, x, neighbours = ctx.saved_tensors
            convolution, input_grad = (getattr(ops, n) for n in (name, input_grad_name))
            grad_grad = grad_x = None
            if ctx.needs_input_grad[0]:
                grad_grad = convolution(x, grad_weight, grad_bias, neighbours, *ctx.shape)
            if ctx.needs_input_grad[1]:
                grad_x = input_grad(grad, grad_weight, neighbours, *ctx.shape)
            return grad_grad, grad_x, None, None, *(None for _ in ctx.shape)

        return backward, setup_context

    return of_convolution, of_input_grad, of_weight_grad


def derivatives_of_function(function: Callable[..., tuple[Tensor, ...]]) -> Derivatives:
    """What `register` takes as derivatives of an op that computes what `function` does.

    For gradients, which are seldom differentiated: `function` is then computed again, and autograd
    differentiates it, any number of times.

    Args:
        function: the op in PyTorch's own ops; of its arguments all floating tensors are
            differentiated.
    """

    def derivatives(ops: Any) -> tuple[Callable, Callable]:
        def setup_context(ctx, inputs, output):
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(inputs[i] for i in ctx.places))

        def backward(ctx, *grads):
            again = torch.is_grad_enabled()  # whether the result will be differentiated too
            arguments = list(ctx.others)
            with torch.enable_grad():
                for i, x in zip(ctx.places, ctx.saved_tensors):
                    # Views: a derivative in one argument does not go through another that was
                    # computed from it.
                    x = x.view_as(x) if again else x.detach()
                    arguments[i] = x if x.requires_grad else x.requires_grad_()
                results = function(*arguments)
            given = [
                (y, grad) for y, grad in zip(results, grads) if grad is not None and y.requires_grad
            ]
            if not given:
                return (None,) * len(arguments)
            ys, grads = zip(*given)
            wanted = [i for i in ctx.places if ctx.needs_input_grad[i]]
            inputs = [arguments[i] for i in wanted]
            found = torch.autograd.grad(ys, inputs, grads, create_graph=again, allow_unused=True)
            by_place = dict(zip(wanted, found))
            return tuple(by_place.get(i) for i in range(len(arguments)))

        return backward, setup_context

    return derivatives
