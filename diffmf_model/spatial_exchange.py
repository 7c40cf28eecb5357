"""Spatial exchange (Sec. III-D): cross-modal state space scanning at scales 1, 1/2 and 1/4."""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from .config import ModelConfig
from .extraction import vss_block


def interleave_columns(maps: Tensor) -> Tensor:
    """M^column of Eq. 10: (2, B, H, W, C) -> (B, H, 2W, C), infrared in the even columns."""
    return rearrange(maps, "m b h w c -> b h (w m) c")


def side_by_side(maps: Tensor) -> Tensor:
    """M^row of Eq. 10: (2, B, H, W, C) -> (B, H, 2W, C), infrared on the left."""
    return rearrange(maps, "m b h w c -> b h (m w) c")


def stack_channels(maps: Tensor) -> Tensor:
    """M^concat of Eq. 10: (2, B, H, W, C) -> (B, H, W, 2C), infrared first."""
    return rearrange(maps, "m b h w c -> b h w (m c)")


class CrossModalScan(nn.Module):
    """One level: both maps (2, B, H, W, C) -> (B, H, W, C).

    Each realignment goes through a VSS block of its own and is folded back by averaging what belongs to the same pixel
    (and channel) of the two modalities; the three C-channel results are projected to C.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.d_model
        self.column = vss_block(config, channels)
        self.row = vss_block(config, channels)
        self.concat = vss_block(config, 2 * channels)
        self.projection = nn.Linear(3 * channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        column = reduce(self.column(interleave_columns(maps)), "b h (w m) c -> b h w c", "mean", m=2)
        row = reduce(self.row(side_by_side(maps)), "b h (m w) c -> b h w c", "mean", m=2)
        concat = reduce(self.concat(stack_channels(maps)), "b h w (m c) -> b h w c", "mean", m=2)
        return self.projection(torch.cat([column, row, concat], dim=-1))


class SpatialExchange(nn.Module):
    """F^c (2, B, H, W, C) -> fused features (B, H, W, C).

    The maps are halved twice by averaging, each level scans its own, then low joins middle and both join high (Fig. 2).
    Odd extents round up when halved, and the upsampled map is cropped to the level above.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.high, self.middle, self.low = (CrossModalScan(config) for _ in range(3))
        self.join_middle, self.join_high = (nn.Linear(2 * config.d_model, config.d_model) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        halved = _halve(maps)
        middle = self.middle(halved)
        middle = self.join_middle(torch.cat([middle, _double(self.low(_halve(halved)), middle)], dim=-1))
        high = self.high(maps)
        return self.join_high(torch.cat([high, _double(middle, high)], dim=-1))


def _halve(maps: Tensor) -> Tensor:
    """(2, B, H, W, C) -> (2, B, ceil(H / 2), ceil(W / 2), C), the mean of each 2x2 block inside the image."""
    images = maps.flatten(0, 1).permute(0, 3, 1, 2)
    images = F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False)
    return images.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2])


def _double(small: Tensor, like: Tensor) -> Tensor:
    """(B, h, w, C) -> twice as large, bilinear, cropped to the height and width of `like`."""
    height, width = like.shape[1:3]
    large = F.interpolate(small.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return large[..., :height, :width].permute(0, 2, 3, 1)
