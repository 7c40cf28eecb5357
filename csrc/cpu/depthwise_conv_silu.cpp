// Tiles of the images, shared out to threads; each tile is one part of the parameter gradients.
#include "diffmf/depthwise_conv_silu.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "pixels.h"
#include "scratch.h"
#include "team.h"

namespace diffmf::cpu {

const PixelKernels& pixel_kernels() { DIFFMF_SELECT(pixel_kernels) }

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // fewer are not worth starting a thread

int64_t tiles_of_image(const DepthwiseConvProblem& p) {
  return (p.height + kTileRows - 1) / kTileRows * ((p.width + kTileColumns - 1) / kTileColumns);
}

template <class Function>
void for_tiles(const DepthwiseConvProblem& p, int64_t scratch_bytes, int threads, Function f) {
  if (p.kernel_size != 1 && p.kernel_size != 3 && p.kernel_size != 5 && p.kernel_size != 7) {
    throw std::invalid_argument("depthwise_conv_silu: kernel_size is " + std::to_string(p.kernel_size) +
                                ", expected 1, 3, 5 or 7");
  }
  const int64_t across = (p.width + kTileColumns - 1) / kTileColumns, tiles = tiles_of_image(p);
  const int64_t groups = (p.channels + kTileChannels - 1) / kTileChannels;
  const int64_t count = p.modalities * p.batch * tiles * groups;
  if (p.elements() == 0) return;
  Team team(static_cast<int>(std::clamp<int64_t>(threads, 1, std::min(count, 1 + p.elements() / kElementsPerThread))));
  Scratch scratch(team.size(), scratch_bytes);
  team.for_each(count, [&](int64_t index, int thread) {
    const int64_t group = index % groups, tile = index / groups % tiles, image = index / groups / tiles;
    const int64_t top = tile / across * kTileRows, left = tile % across * kTileColumns;
    const int64_t m = image / p.batch, b = image % p.batch, first = group * kTileChannels;
    f(ConvTile{m, b, top, std::min(top + kTileRows, p.height), left, std::min(left + kTileColumns, p.width), first,
               std::min(first + kTileChannels, p.channels), b * tiles + tile},
      scratch.of(thread));
  });
}

}  // namespace

void depthwise_conv_silu_forward(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, void* y,
                                 int threads) {
  const PixelKernels& kernels = pixel_kernels();
  for_tiles(problem, kernels.conv_scratch(problem, false), threads,
            [&](const ConvTile& tile, void* scratch) { kernels.conv_forward(problem, inputs, y, tile, scratch); });
}

int64_t depthwise_conv_silu_backward_parts(const DepthwiseConvProblem& problem, const DepthwiseConvInputs&) {
  return problem.batch * tiles_of_image(problem);
}

void depthwise_conv_silu_backward(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs,
                                  const DepthwiseConvGradients& gradients, int threads) {
  const PixelKernels& kernels = pixel_kernels();
  for_tiles(problem, kernels.conv_scratch(problem, true), threads, [&](const ConvTile& tile, void* scratch) {
    kernels.conv_backward(problem, inputs, gradients, tile, scratch);
  });
}

}  // namespace diffmf::cpu
