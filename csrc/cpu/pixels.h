// Between the drivers (depthwise_conv_silu.cpp, norm_gate.cpp: threads and the order of sums) and the kernels on
// channels-last pixels (pixels_kernels.h, compiled once per instruction set).
#pragma once

#include <cstdint>

#include "diffmf/depthwise_conv_silu.h"
#include "diffmf/norm_gate.h"

namespace diffmf::cpu {

// A tile of one image: what a thread convolves at a time, small enough for its cache.
constexpr int64_t kTileRows = 16, kTileColumns = 32, kTileChannels = 64;
constexpr int64_t kVectorFloats = 16;  // buffers hold a multiple of as many channels

struct ConvTile {
  int64_t m, b, top, bottom, left, right, first, last;  // rows, columns and channels [first, last)
  int64_t part;
};

// The kernels of one instruction set.
struct PixelKernels {
  // Bytes of a thread's scratch memory for a tile; buffers start on 64 bytes.
  int64_t (*conv_scratch)(const DepthwiseConvProblem&, bool backward);
  void (*conv_forward)(const DepthwiseConvProblem&, const DepthwiseConvInputs&, void* y, const ConvTile&,
                       void* scratch);
  void (*conv_backward)(const DepthwiseConvProblem&, const DepthwiseConvInputs&, const DepthwiseConvGradients&,
                        const ConvTile&, void* scratch);
  // Pixels [first, last) of modality m; scratch of norm_scratch bytes.
  int64_t (*norm_scratch)(const NormGateProblem&);
  void (*norm_forward)(const NormGateProblem&, const NormGateInputs&, void* out, int64_t m, int64_t first, int64_t last,
                       void* scratch);
  void (*norm_backward)(const NormGateProblem&, const NormGateInputs&, const NormGateGradients&, int64_t m,
                        int64_t first, int64_t last, int64_t part, void* scratch);
};

namespace baseline {
extern const PixelKernels pixel_kernels;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const PixelKernels pixel_kernels;
}  // namespace avx2
namespace avx512 {
extern const PixelKernels pixel_kernels;
}  // namespace avx512
#endif

const PixelKernels& pixel_kernels();

}  // namespace diffmf::cpu
