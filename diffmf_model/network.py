"""DIFF-MF: stem, difference-driven extraction, channel exchange, spatial exchange, decoder (Fig. 2)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channel_exchange import ChannelExchange
from .config import ModelConfig
from .extraction import ConvLayer, ExtractionStage
from .spatial_exchange import SpatialExchange


class Decoder(nn.Module):
    """Features (B, H, W, C) -> image (B, 1, H P, W P) in [0, 1], P = config.patch_size; float32 under autocast too.

    Where it reads pixels (P above 1), the sources' P² of each patch come beside the features: (B, H, W, C + 2 P²).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        pixels = self.patch_size**2
        self.reads_pixels = pixels > 1  # not every pixel's detail has room in the C channels of a patch
        inputs = config.d_model + (2 * pixels if self.reads_pixels else 0)
        width = max(1, round(config.decoder_ratio * config.d_model))
        widths = [inputs] + [width] * config.decoder_layers
        self.features = nn.Sequential(*(ConvLayer(*each) for each in pairwise(widths)))
        self.image = nn.Conv2d(width, pixels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.image(self.features(x).permute(0, 3, 1, 2))
        # bf16 has fewer levels near 1 than an 8-bit image; of the logits it has enough.
        patches = torch.sigmoid(logits.to(self.image.weight.dtype))
        return F.pixel_shuffle(patches, self.patch_size)


class DIFFMF(nn.Module):
    """The fusion network. Inside, activations are channels-last with modalities leading: (2, B, H, W, C).

    With config.patch_size P above 1, a token is a patch of P x P pixels: H and W inside are a P-th of the image's, and
    the decoder reads the sources' pixels beside the fused features.

    forward(ir, vi): the infrared image and the visible one's Y, both (B, 1, H, W) in [0, 1], any H, W >= 1 -> the fused
    image (B, 1, H, W) in [0, 1]. Raises ValueError for other shapes and TypeError for integer images.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        channels = config.d_model
        self.stem_ir, self.stem_vi = (
            nn.Sequential(ConvLayer(config.patch_size**2, channels), ConvLayer(channels, channels)) for _ in range(2)
        )
        self.extraction = nn.ModuleList(ExtractionStage(config) for _ in range(config.stages * config.extraction))
        self.channel_exchange = ChannelExchange(config) if config.channel_exchange != "off" else nn.Identity()
        self.spatial_exchange = SpatialExchange(config) if config.spatial_exchange else None
        self.decoder = Decoder(config)

    def forward(self, ir: Tensor, vi: Tensor) -> Tensor:
        _check_image("ir", ir)
        _check_image("vi", vi)
        if ir.shape != vi.shape:
            raise ValueError(f"vi: expected the shape of ir, {tuple(ir.shape)}, found {tuple(vi.shape)}")
        height, width = ir.shape[2:]
        ir, vi = (_patches(image, self.config.patch_size) for image in (ir, vi))
        features = shared = torch.stack([self.stem_ir(ir), self.stem_vi(vi)])
        for stage in self.extraction:
            features, shared = stage(features, shared)
        features = self.channel_exchange(features)
        fused = features.mean(0) if self.spatial_exchange is None else self.spatial_exchange(features)
        if self.decoder.reads_pixels:
            fused = torch.cat([fused, ir.to(fused.dtype), vi.to(fused.dtype)], dim=-1)
        return self.decoder(fused)[..., :height, :width]


def _patches(image: Tensor, size: int) -> Tensor:
    """(B, 1, H, W) -> (B, ceil(H / size), ceil(W / size), size²); the last row and column repeat to fill a patch."""
    missing = (0, -image.shape[3] % size, 0, -image.shape[2] % size)
    if any(missing):
        image = F.pad(image, missing, mode="replicate")
    return F.pixel_unshuffle(image, size).permute(0, 2, 3, 1)


def _check_image(name: str, image: Tensor) -> None:
    if image.dim() != 4 or image.shape[1] != 1 or 0 in image.shape[2:]:
        raise ValueError(f"{name}: expected shape (B, 1, H, W) with H, W >= 1, found {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point image in [0, 1], found {image.dtype}")
