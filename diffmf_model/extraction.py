"""Difference-driven feature extraction (Sec. III-B, Algorithm 1)."""

import torch
from torch import Tensor, nn

from diffmf_ops.modules import VSSBlock

from .config import ModelConfig


def vss_block(config: ModelConfig, channels: int, modalities: int = 1) -> VSSBlock:
    """The VSS block that the whole network uses, at a width of `channels`."""
    return VSSBlock(
        channels,
        drop_path=config.drop_path,
        ssm_d_state=config.d_state,
        ssm_ratio=config.ssm_ratio,
        forward_type="v05" if config.gated else "v05_noz",
        mlp_ratio=config.mlp_ratio,
        modalities=modalities,
        scalar_decay=config.scalar_decay,
    )


class ConvLayer(nn.Module):
    """3x3 convolution and SiLU on channels-last tensors: (B, H, W, in) -> (B, H, W, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        # For one-channel images the result may be channels-first: one copy here, and all that follows is channels-last.
        return self.act(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous())


def difference(shared: Tensor) -> Tensor:
    """Diff = tanh|share_vi - share_ir| (line 4): (2, B, H, W, C) -> (B, H, W, C) in [0, 1)."""
    infrared, visible = shared
    return torch.tanh((visible - infrared).abs())


def guide(features: Tensor, shared: Tensor, guidance: str) -> Tensor:
    """Difference guidance of the self features by the shared ones, all (2, B, H, W, C).

    infrared_first: lines 5 and 6; visible_first, parallel: versions 1 and 2 of Table III; none: the shared features are
    added back (Table II).
    """
    if guidance == "none":
        return features + shared
    infrared, visible = features
    diff = difference(shared)
    if guidance == "visible_first":
        visible = torch.lerp(visible, infrared, diff)  # (1 - diff) * visible + diff * infrared
        infrared = torch.lerp(infrared, visible, diff)
    else:
        guided = torch.lerp(infrared, visible, diff)
        source = guided if guidance == "infrared_first" else infrared
        infrared, visible = guided, torch.lerp(visible, source, diff)
    return torch.stack([infrared, visible])


class ExtractionStage(nn.Module):
    """One pass of Algorithm 1: (self features, shared features) -> the same pair, each (2, B, H, W, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.guidance = config.guidance
        self.self_block = vss_block(config, config.d_model, modalities=2)
        self.share_conv = ConvLayer(config.d_model, config.d_model)
        self.share_block = vss_block(config, config.d_model)

    def forward(self, features: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        features = self.self_block(features)
        both = self.share_block(self.share_conv(shared.flatten(0, 1)))  # one set of weights: modalities join the batch
        shared = both.view(shared.shape)
        return guide(features, shared, self.guidance), shared
