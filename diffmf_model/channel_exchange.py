"""Channel exchange (Sec. III-C): cross-modal SSD exchange, then gated channel reweighting."""

import torch
from torch import Tensor, nn

from diffmf_ops.modules import SS2D, LayerNorm, Linear

from .config import ModelConfig


class ChannelExchange(nn.Module):
    """F^e -> F^c, both (2, B, H, W, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = LayerNorm(config.d_model, modalities=2)
        # No residual of its own: Eq. 7 adds F^e with learned weights, and Table VI takes that away.
        self.ssd = SS2D(
            config.d_model,
            config.d_state,
            config.ssm_ratio,
            forward_type="v05" if config.gated else "v05_noz",
            modalities=2,
            exchange=config.exchange,
            reproject=config.channel_exchange == "reproject",
            scalar_decay=config.scalar_decay,
        )
        self.reweighting = ChannelReweighting(config) if config.reweighting else None

    def forward(self, features: Tensor) -> Tensor:
        exchanged = self.ssd(self.norm(features))
        return exchanged if self.reweighting is None else self.reweighting(features, exchanged)


class ChannelReweighting(nn.Module):
    """Eqs. 7 and 8: (F^e, F^e') -> F^c, all (2, B, H, W, C).

    alpha and beta: sigmoid of a linear map of the pooled F^e, one weight per modality, sample and channel.
    gate: omega from F_ir^e and F_ir^e' ("eq8") or from F_ir^e and F_vi^e ("fig2"), pooled, linear, sigmoid.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.d_model
        self.gate_inputs = config.gate
        self.residual = Linear(channels, channels, modalities=2) if config.residual else None
        self.projection = Linear(channels, channels, modalities=2)
        nn.init.ones_(self.projection.bias)  # the product of Eq. 7 starts near its left factor
        self.gate = nn.Linear(2 * channels, channels)

    def forward(self, features: Tensor, exchanged: Tensor) -> Tensor:
        pooled = features.mean((2, 3))  # (2, B, C)
        mixed = exchanged
        if self.residual is not None:
            mixed = mixed + features * _per_pixel(torch.sigmoid(self.residual(pooled)))
        mixed = mixed * self.projection(exchanged)
        second = exchanged[0].mean((1, 2)) if self.gate_inputs == "eq8" else pooled[1]
        omega = _per_pixel(torch.sigmoid(self.gate(torch.cat([pooled[0], second], dim=-1))))  # (B, 1, 1, C)
        return torch.lerp(mixed, mixed.flip(0), omega.to(mixed.dtype))  # (1 - omega) * mixed + omega * flipped


def _per_pixel(weights: Tensor) -> Tensor:
    """(..., B, C) -> (..., B, 1, 1, C)."""
    return weights[..., None, None, :]
