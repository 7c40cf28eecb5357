"""Operators that PyTorch knows, called without its dispatcher where nothing needs the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


class Operator:
    """`kernel` as the operator diffmf::NAME (of its name, without leading underscore) of torch.library.

    A call goes through PyTorch's dispatcher where something must see it: torch.compile, torch.export, a dispatch mode,
    a profiler, a tensor subclass, a tensor of the meta device or one that is a negated view. Otherwise it goes straight
    to the kernel, under an autograd function of its own if a gradient is wanted: registered operators take several
    times the CPU time of a small launch, and torch.func refuses them.
    """

    def __init__(self, kernel: Callable):
        self.kernel = kernel
        self.name = f"diffmf::{kernel.__name__.removeprefix('_')}"
        self.registered = torch.library.custom_op(self.name, kernel, mutates_args=())
        self.register_fake = self.registered.register_fake
        self.function = self.transformable = None

    def register_autograd(self, gradients: Callable, *, setup_context: Callable) -> None:
        """As of torch.library: setup_context(ctx, inputs, output) saves, gradients(ctx, *of_outputs) returns theirs."""
        self.registered.register_autograd(gradients, setup_context=setup_context)
        self.registered.register_vmap(self._call_in_turn)

        def forward(ctx, *inputs):
            output = self.kernel(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def function(**forms):
            static = {name: staticmethod(form) for name, form in forms.items()}
            return type(self.name, (torch.autograd.Function,), static)

        self.function = function(forward=forward, backward=gradients)
        # torch.func needs a setup_context; with one, every call binds its arguments by inspection, which takes longer.
        self.transformable = function(
            forward=self.kernel, setup_context=setup_context, backward=gradients, vmap=self._call_in_turn
        )

    def _call_in_turn(self, info, in_dims, *arguments):
        """torch.func.vmap: a call for each item, since any of the tensors may be batched."""
        outputs = []
        for item in range(info.batch_size):
            pairs = zip(arguments, in_dims, strict=True)  # in_dims of a list of paths is a list of None
            outputs.append(self(*(a.select(d, item) if isinstance(d, int) else a for a, d in pairs)))
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    def refuse_double_backward(self) -> None:
        """Gives a backward operator an autograd formula that raises: the kernels have first derivatives only."""

        def save_nothing(ctx, inputs, output):
            del ctx, inputs, output

        def refuse(ctx, *of_outputs):
            raise RuntimeError(f"{self.name}: double backward is not supported")

        self.register_autograd(refuse, setup_context=save_nothing)

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or _watched(arguments):
            return self.registered(*arguments)
        if _has_tangent(arguments):
            raise NotImplementedError(f"{self.name}: forward-mode differentiation is not supported")
        if _transformed():
            return self.transformable.apply(*arguments)
        if wants_gradient(arguments):
            return self.function.apply(*arguments)
        return self.kernel(*arguments)


def is_plain(arguments) -> bool:
    """Whether nothing but autograd must see a call: not torch.compile, a dispatch mode, a subclass or torch.func."""
    return not (torch.compiler.is_compiling() or _watched(arguments) or _transformed())


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of the activation x; None without autocast, and for float64, which it leaves alone.

    Meta tensors are in nobody's autocast.
    """
    if x.is_meta or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def wants_gradient(arguments) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(arguments) -> bool:
    """Whether a derivative is wanted by forward-mode differentiation, which the kernels do not have."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments)


def _watched(arguments) -> bool:
    """Whether a mode, a profiler or a tensor that is more than its memory must see the call."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing() or torch.autograd._profiler_enabled():
        return True
    if arguments[0].is_meta:  # then all are
        return True
    if torch._C._functorch.is_legacy_batchedtensor(arguments[0]):  # autograd's is_grads_batched, in a backward pass
        return True
    for each in arguments:  # every call pays for this: no test that is not needed
        if type(each) in PLAIN:
            if each.is_neg():
                return True
        elif isinstance(each, torch.Tensor):
            return True
    return False
