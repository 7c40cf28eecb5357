"""SS2D and VSSBlock: VMamba's modules over the fused operator, and their two-modality form.

With `modalities=1` the state_dict keys and shapes are VMamba's, so its published checkpoints load unchanged. With
`modalities=2` every parameter gets a leading axis (infrared, visible), activations are (2, B, H, W, C), the GEMMs are
batched over that axis and both modalities share one launch of the scan.

Supported of VMamba: forward types v0, v2, v3, v03, v04 and v05 (one definition in different backends; here the state is
fp32 in all of them) with the postfixes _noz, _nozact, _oact, _no32 and _onnone; any d_state, ssm_ratio, dt_rank, d_conv
(below 2 for none), conv_bias, act_layer, dropout, drop_path, mlp_ratio; channel_first or channels-last tensors (the
"ln2d" and "ln" norms have the same parameters). Not supported, and refused by name: other scan orders (v051d, v052d,
...), other output norms and initializations, xv and Mamba-2 (m0) types.

VMamba's own network takes this layer in place of its own: `vmamba.VSSM(..., _SS2D=SS2D)`.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import scan
from .checks import check_range, check_rank
from .depthwise_conv_silu import KERNEL_SIZES, depthwise_conv_silu
from .dispatch import autocast_dtype, is_plain, wants_gradient
from .norm_gate import norm_gate
from .reference import EXCHANGE_SOURCES
from .ss2d import ss2d

PATHS = (0, 1, 2, 3)
FORWARD_TYPES = ("v0", "v2", "v3", "v03", "v04", "v05")
CHANNELS_LAST_ONLY = "channel_first=True needs modalities=1: two modalities are (2, B, H, W, C)"
POSTFIXES = ("_no32", "_oact", "_noz", "_nozact", "_onnone")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) by weight (O, I), or x (M, ..., I) by weight (M, O, I) as one batched GEMM; bias ([M,] O)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    tokens = _runs(x) if wants_gradient((weight,)) else x.flatten(1, -2)
    runs = len(tokens) // len(weight)
    weight = _repeated(weight.mT, runs)
    y = torch.bmm(tokens, weight) if bias is None else torch.baddbmm(_repeated(bias, runs)[:, None], tokens, weight)
    return y.view(*x.shape[:-1], y.shape[-1])


def _runs(x: Tensor) -> Tensor:
    """(M, ..., I) -> (M * runs, tokens, I): on a GPU, runs of tokens as a batch of their own.

    The weight's gradient sums over the tokens, and cuBLAS does not split the sum of a batched product, so one product
    per modality would leave most of the GPU idle.
    """
    tokens = x.flatten(1, -2)
    runs = math.gcd(tokens.shape[1], 64) if x.is_cuda else 1
    return tokens.unflatten(1, (runs, -1)).flatten(0, 1)


def _repeated(weight: Tensor, runs: int) -> Tensor:
    """(M, ...) -> (M * runs, ...), every modality's for all of its runs; a view where there is one."""
    return weight.unsqueeze(1).expand(-1, runs, *weight.shape[1:]).flatten(0, 1)


def project(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, linear(x, weight)), for an operator that reads both; autocast is applied to both.

    The GEMM that gives the projection's part of x's gradient adds it to the other part in place: one pass over the
    activations less. So the returned x must go to one operator only, and that must not keep its gradient.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if is_plain((x, weight)) and wants_gradient((x, weight)):
        return _Project.apply(x, weight)
    return x, linear(x, weight)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x, linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dproj):
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        dx, dweight = dx.contiguous(), None
        if weight.dim() == 2:
            dproj = dproj.flatten(0, -2)
            if of_x:
                dx.flatten(0, -2).addmm_(dproj, weight)
            if of_weight:
                dweight = dproj.mT @ x.flatten(0, -2)
        else:
            dproj = _runs(dproj)
            runs = len(dproj) // len(weight)
            if of_x:
                _runs(dx).baddbmm_(dproj, _repeated(weight, runs))
            if of_weight:
                dweight = torch.bmm(dproj.mT, _runs(x)).unflatten(0, (-1, runs)).sum(1)
        return dx if of_x else None, dweight


class Linear(nn.Linear):
    """A linear layer on the last axis, with its own weights per modality when modalities is 2.

    weight ([M,] O, I), bias ([M,] O). A 1x1 convolution's weight (O, I, 1, 1) loads too, as it does in VMamba.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, modalities: int = 1):
        super().__init__(in_features, out_features, bias)
        if modalities > 1:
            bound = in_features**-0.5  # as nn.Linear has it
            self.weight = _uniform(bound, modalities, out_features, in_features)
            self.bias = _uniform(bound, modalities, out_features) if bias else None
        self.register_load_state_dict_pre_hook(_flatten_pointwise_weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


def _flatten_pointwise_weight(module, state_dict, prefix, *_):
    weight = state_dict.get(prefix + "weight")
    if weight is not None and weight.dim() == module.weight.dim() + 2 and weight.shape[-2:] == (1, 1):
        state_dict[prefix + "weight"] = weight.flatten(-3)


class LayerNorm(nn.Module):
    """Layer normalization of the last axis of ([M,] B, H, W, C), times SiLU(z) where z is given; weight, bias ([M,] C).

    The result has the dtype of x, under autocast too; statistics are float32.
    """

    def __init__(self, channels: int, modalities: int = 1, eps: float = 1e-5):
        super().__init__()
        lead = () if modalities == 1 else (modalities,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(*lead, channels))
        self.bias = nn.Parameter(torch.zeros(*lead, channels))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return norm_gate(x, self.weight.to(dtype), self.bias.to(dtype), z, self.eps)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of channels-last tensors ([M,] B, H, W, D), zero-padded, and an activation module.

    weight ([M,] D, 1, k, k). With SiLU and an odd k up to 7 both are one operator.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True, modalities: int = 1):
        super().__init__()
        lead = () if modalities == 1 else (modalities,)
        self.padding = (kernel_size - 1) // 2
        bound = 1 / kernel_size
        shape = (*lead, channels, 1, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, channels).uniform_(-bound, bound)) if bias else None

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=self.padding, groups=len(weight))
        return y.permute(0, 2, 3, 1)

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        if type(act) is nn.SiLU and self.weight.shape[-1] in KERNEL_SIZES:
            dtype = torch.promote_types(x.dtype, torch.float32)
            return depthwise_conv_silu(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        if self.weight.dim() == 4:
            return act(self._convolve(x, self.weight, self.bias))
        biases = [None] * len(x) if self.bias is None else self.bias
        return act(torch.stack([self._convolve(*each) for each in zip(x, self.weight, biases, strict=True)]))


class DropPath(nn.Module):
    """Stochastic depth: drops whole samples of ([M,] B, H, W, C) with the given probability while training."""

    def __init__(self, probability: float = 0.0):
        super().__init__()
        check_range("drop_path", probability, 0, 1)
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if self.probability == 0 or not self.training:
            return x
        keep = 1 - self.probability
        return x * x.new_empty((*x.shape[:-3], 1, 1, 1)).bernoulli_(keep).div_(keep or 1)


class SS2D(nn.Module):
    """2-D selective scan layer (VMamba's SS2D): (B, H, W, d_model) -> the same shape, or (2, B, H, W, d_model).

    in_proj -> depthwise conv -> act -> [Δ | B | C] of every path by one GEMM -> fused scan over four paths, merged
    -> out_norm [-> times act(z)] -> out_proj.

    d_model, d_state, ssm_ratio, dt_rank: C, N, D / C and R ("auto" is ceil(d_model / 16)).
    initialize, forward_type: VMamba's names; of the first, v0 (Mamba's), of the second, those of the module docstring.
    channel_first: tensors are (B, C, H, W); one modality only.
    modalities: 2 for (infrared, visible) with separate weights.
    exchange: whose B and C each modality's scan uses: "none", "mutual" (Eq. 6), "from_visible" (Eq. 15) or
        "from_infrared" (Eq. 16); other than "none" needs two modalities.
    reproject: Eqs. 5 and 6 to the letter: per path, tokens are projected and split into x, B and C, B and C are
        exchanged, and the three are projected back to D channels, which enter an SSM of their own. Otherwise the scan
        reads the other modality's B and C directly.
    scalar_decay: one decay per channel and path for all states (the SSD form): A_logs has one column.
    Raises ValueError or TypeError for an unsupported argument or combination.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        act_layer: type[nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        initialize: str = "v0",
        forward_type: str = "v05",
        channel_first: bool = False,
        modalities: int = 1,
        exchange: str = "none",
        reproject: bool = False,
        scalar_decay: bool = False,
    ):
        super().__init__()
        options = _parse_forward_type(forward_type)
        if initialize != "v0":
            raise ValueError(f"initialize: expected 'v0', found {initialize!r}")
        if modalities not in (1, 2):
            raise ValueError(f"modalities: expected 1 or 2, found {modalities!r}")
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f"d_conv: expected an odd size (1 or less: no convolution), found {d_conv}")
        if exchange not in EXCHANGE_SOURCES:
            raise ValueError(f"exchange: expected one of {', '.join(EXCHANGE_SOURCES)}, found {exchange!r}")
        if modalities == 1 and (exchange != "none" or reproject):
            raise ValueError(f"exchange={exchange!r}, reproject={reproject} needs modalities=2, found modalities=1")
        if modalities == 2 and channel_first:
            raise ValueError(CHANNELS_LAST_ONLY)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name, value in (("d_model", d_model), ("d_state", d_state), ("dt_rank", self.dt_rank), ("d_conv", d_conv)):
            if not isinstance(value, Integral):
                raise TypeError(f"{name}: expected an integer, found {value!r}")
        self.d_model, self.d_state, self.d_inner = d_model, d_state, int(ssm_ratio * d_model)
        for name, value, most in (
            ("ssm_ratio * d_model", self.d_inner, scan.MAX_CHANNELS),
            ("dt_rank", self.dt_rank, scan.MAX_RANK),
            ("d_state", d_state, scan.MAX_STATES),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name}: expected 1 to {most}, found {value}")
        self.channel_first, self.exchange, self.reproject = channel_first, exchange, reproject
        self.gated, self.gate_act = "_noz" not in options, "_nozact" not in options
        self.layout = "(B, d_model, H, W)" if channel_first else "(B, H, W, d_model)"
        if modalities == 2:
            self.layout = "(2, B, H, W, d_model)"
        lead = () if modalities == 1 else (modalities,)
        inner, paths, rank = self.d_inner, len(PATHS), self.dt_rank

        self.in_proj = Linear(d_model, inner * (2 if self.gated else 1), bias, modalities)
        self.act = _activation(act_layer)
        self.conv2d = DepthwiseConv(inner, d_conv, conv_bias, modalities) if d_conv > 1 else None
        self.x_proj_weight = _uniform(inner**-0.5, *lead, paths, rank + 2 * d_state, inner)
        self.dt_projs_weight = _uniform(rank**-0.5, *lead, paths, inner, rank)
        # softplus(bias) is log-uniform in [dt_min, dt_max] at the start.
        delta = torch.empty(*lead, paths, inner).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))
        if scalar_decay:  # as Mamba-2 starts: uniform in [1, 16]
            decay = torch.empty(*lead, paths * inner, 1).uniform_(1, 16).log()
        else:  # S4D-real
            decay = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(*lead, paths * inner, 1)
        self.A_logs = nn.Parameter(decay)
        self.Ds = nn.Parameter(torch.ones(*lead, paths * inner))
        self.A_logs._no_weight_decay = self.Ds._no_weight_decay = True  # as in VMamba, for whoever groups parameters
        if reproject:
            width = inner + 2 * d_state
            self.exchange_proj_weight = _uniform(inner**-0.5, *lead, paths, width, inner)
            self.exchange_reproj_weight = _uniform(width**-0.5, *lead, paths, inner, width)
        self.out_norm = nn.Identity() if "_onnone" in options else LayerNorm(inner, modalities)
        self.out_act = nn.GELU() if "_oact" in options else nn.Identity()
        self.out_proj = Linear(inner, d_model, bias, modalities)
        self.dropout = nn.Dropout(dropout)

    def _gates_in_norm(self) -> bool:
        """Whether act(z) can be applied by out_norm; whatever the submodules are by now."""
        return (
            self.gate_act
            and type(self.act) is nn.SiLU
            and isinstance(self.out_norm, LayerNorm)
            and type(self.out_act) is nn.Identity
        )

    def _exchanged_tokens(self, x: Tensor) -> Tensor:
        """x (2, B, H, W, D) -> Projection[x, B, C] of Eqs. 5 and 6, (2, B, H, W, K, D)."""
        split = linear(x, self.exchange_proj_weight.flatten(1, 2)).unflatten(-1, (len(PATHS), -1))
        own, exchanged = split.split([self.d_inner, 2 * self.d_state], dim=-1)
        source = EXCHANGE_SOURCES[self.exchange]
        tokens = torch.cat([own, torch.stack([exchanged[source[0]], exchanged[source[1]]])], dim=-1)
        return torch.einsum("mbhwkc,mkdc->mbhwkd", tokens, self.exchange_reproj_weight)

    def scan(self, x: Tensor) -> Tensor:
        """Projections and the fused scan: ([2,] B, H, W, D) -> the same shape, summed over the paths."""
        x_proj_weight, dt_weight = self.x_proj_weight, self.dt_projs_weight
        if x.is_cuda and self.dt_rank % 2 == 1 and (autocast_dtype(x) or x.dtype).itemsize == 2:
            x_proj_weight, dt_weight = _one_more_rank(x_proj_weight, dt_weight)
        if self.reproject:
            x = self._exchanged_tokens(x)
            proj = torch.einsum("mbhwkd,mkcd->mbhwkc", x, x_proj_weight)
        else:
            x, proj = project(x, x_proj_weight.flatten(-3, -2))
            proj = proj.unflatten(-1, (len(PATHS), -1))
        dtype = torch.promote_types(x.dtype, torch.float32)  # the operator's parameters are never below fp32
        per_path = (len(PATHS), self.d_inner)
        return ss2d(
            x,
            proj,
            dt_weight.to(dtype),
            self.dt_projs_bias.to(dtype),
            -self.A_logs.to(dtype).exp().unflatten(-2, per_path),
            self.Ds.to(dtype).unflatten(-1, per_path),
            paths=PATHS,
            exchange="none" if self.reproject else self.exchange,
        )

    def forward(self, x: Tensor) -> Tensor:
        check_rank("x", x, (self.x_proj_weight.dim() + 1,), self.layout)
        if x.shape[1 if self.channel_first else -1] != self.d_model:
            raise ValueError(f"x: shape {tuple(x.shape)}, expected {self.layout} with d_model = {self.d_model}")
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        x = self.in_proj(x)
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        x = self.act(x) if self.conv2d is None else self.conv2d(x, self.act)
        y = self.scan(x)
        if self.gated and self._gates_in_norm():
            y = self.out_norm(y, z)
        else:
            y = self.out_act(self.out_norm(y))
            if self.gated:
                y = y * (self.act(z) if self.gate_act else z)
        y = self.dropout(self.out_proj(y))
        return y.permute(0, 3, 1, 2) if self.channel_first else y


class Mlp(nn.Module):
    """fc1 -> GELU -> fc2 on the last axis."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0, modalities: int = 1):
        super().__init__()
        self.fc1 = Linear(channels, hidden, modalities=modalities)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, channels, modalities=modalities)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class VSSBlock(nn.Module):
    """Visual state space block (VMamba): x + SS2D(norm(x)), then x + MLP(norm2(x)) unless mlp_ratio is 0.

    Tensors are (B, H, W, hidden_dim), (B, hidden_dim, H, W) with channel_first, or (2, B, H, W, hidden_dim) with
    modalities=2. Arguments are VMamba's; modalities and scalar_decay are those of `SS2D`, as are the errors.
    """

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        *,
        channel_first: bool = False,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: type[nn.Module] = nn.SiLU,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        forward_type: str = "v05",
        mlp_ratio: float = 4.0,
        mlp_drop_rate: float = 0.0,
        modalities: int = 1,
        scalar_decay: bool = False,
    ):
        super().__init__()
        if modalities == 2 and channel_first:
            raise ValueError(CHANNELS_LAST_ONLY)
        self.channel_first = channel_first
        self.norm = LayerNorm(hidden_dim, modalities)
        self.op = SS2D(
            hidden_dim,
            ssm_d_state,
            ssm_ratio,
            ssm_dt_rank,
            ssm_act_layer,
            ssm_conv,
            ssm_conv_bias,
            ssm_drop_rate,
            forward_type=forward_type,
            modalities=modalities,
            scalar_decay=scalar_decay,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(hidden_dim, modalities) if mlp_ratio > 0 else None
        hidden = int(hidden_dim * mlp_ratio)
        self.mlp = Mlp(hidden_dim, hidden, mlp_drop_rate, modalities) if mlp_ratio > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2) if self.channel_first else x


def _one_more_rank(x_proj_weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R + 2N, D) and (..., D, R) with a zero for one more rank: the same steps.

    The kernels copy words. Rows of an odd number of 16-bit values would be copied one by one.
    """
    return F.pad(x_proj_weight, (0, 0, 1, 0)), F.pad(dt_weight, (1, 0))


def _activation(act_layer) -> nn.Module:
    act = act_layer() if callable(act_layer) and not isinstance(act_layer, nn.Module) else None
    if not isinstance(act, nn.Module):
        raise TypeError(f"act_layer: expected a module's class such as torch.nn.SiLU, found {act_layer!r}")
    return act


def _uniform(bound: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _parse_forward_type(forward_type: str) -> list[str]:
    """VMamba's type name with its postfixes, as [type, postfix, ...]; ValueError for what is not supported."""
    name, *postfixes = forward_type.split("_")
    options = [name] + [f"_{postfix}" for postfix in postfixes]
    if name not in FORWARD_TYPES or not set(options[1:]) <= set(POSTFIXES):
        raise ValueError(
            f"forward_type: expected one of {', '.join(FORWARD_TYPES)} with postfixes of {', '.join(POSTFIXES)}, "
            f"found {forward_type!r}"
        )
    return options
