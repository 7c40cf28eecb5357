"""DIFF-MF: stem, difference-driven extraction, channel exchange, spatial exchange, decoder (Fig. 2)."""

import torch
from torch import Tensor, nn

from .channel_exchange import ChannelExchange
from .config import ModelConfig
from .extraction import ConvLayer, ExtractionStage
from .spatial_exchange import SpatialExchange


class Decoder(nn.Module):
    """Features (B, H, W, C) -> image (B, 1, H, W) in [0, 1], float32 under autocast too."""

    def __init__(self, channels: int):
        super().__init__()
        self.features = ConvLayer(channels, channels)
        self.image = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2)
        # bf16 has fewer levels near 1 than an 8-bit image.
        with torch.autocast(x.device.type, enabled=False):
            return torch.sigmoid(self.image(x.to(self.image.weight.dtype)))


class DIFFMF(nn.Module):
    """The fusion network. Inside, activations are channels-last with modalities leading: (2, B, H, W, C).

    forward(ir, vi): the infrared image and the visible one's Y, both (B, 1, H, W) in [0, 1], any H, W >= 1 -> the fused
    image (B, 1, H, W) in [0, 1]. Raises ValueError for other shapes and TypeError for integer images.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        channels = config.d_model
        self.stem_ir, self.stem_vi = (
            nn.Sequential(ConvLayer(1, channels), ConvLayer(channels, channels)) for _ in range(2)
        )
        self.extraction = nn.ModuleList(ExtractionStage(config) for _ in range(config.stages * config.extraction))
        self.channel_exchange = ChannelExchange(config) if config.channel_exchange != "off" else nn.Identity()
        self.spatial_exchange = SpatialExchange(config) if config.spatial_exchange else None
        self.decoder = Decoder(channels)

    def forward(self, ir: Tensor, vi: Tensor) -> Tensor:
        _check_image("ir", ir)
        _check_image("vi", vi)
        if ir.shape != vi.shape:
            raise ValueError(f"vi: expected the shape of ir, {tuple(ir.shape)}, found {tuple(vi.shape)}")
        ir, vi = (image.permute(0, 2, 3, 1) for image in (ir, vi))
        features = shared = torch.stack([self.stem_ir(ir), self.stem_vi(vi)])
        for stage in self.extraction:
            features, shared = stage(features, shared)
        features = self.channel_exchange(features)
        fused = features.mean(0) if self.spatial_exchange is None else self.spatial_exchange(features)
        return self.decoder(fused)


def _check_image(name: str, image: Tensor) -> None:
    if image.dim() != 4 or image.shape[1] != 1 or 0 in image.shape[2:]:
        raise ValueError(f"{name}: expected shape (B, 1, H, W) with H, W >= 1, found {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point image in [0, 1], found {image.dtype}")
