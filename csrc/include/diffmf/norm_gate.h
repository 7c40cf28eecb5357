// norm_gate: layer normalization of the channels of every pixel, then a SiLU gate.
//
//     n   = (y - mean_d y) / sqrt(var_d y + eps)          (the biased variance)
//     out = (n * weight[m] + bias[m]) * z * sigmoid(z)    (without z: no gate)
//
// Every pointer is a plain device or host pointer; the caller allocates everything. Arithmetic is float (double when
// dtype == f64, host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include "diffmf/ss2d.h"

namespace diffmf {

struct NormGateProblem {
  DType dtype;                           // of y, z and out
  int64_t modalities, pixels, channels;  // pixels of one modality
  double eps;
};

// Strides in elements; the channels of a pixel are contiguous.
struct PixelStrides {
  int64_t modality, pixel;
};

struct NormGateInputs {
  const void* y;  // [M, P, D], dtype
  PixelStrides y_strides;
  const void* z;  // [M, P, D], dtype; may be null
  PixelStrides z_strides;
  const void* weight;  // [M, D], float (double for f64)
  const void* bias;    // [M, D]
};

// The parameter gradients come as `parts` partial sums to be added along the first axis.
struct NormGateGradients {
  const void* dout;  // [M, P, D] contiguous, dtype
  void* dy;          // [M, P, D] contiguous, dtype
  void* dz;          // likewise; null when z is null
  void* dweight;     // [parts, M, D], float
  void* dbias;       // [parts, M, D], float
};

namespace cpu {
// Both run on `threads` threads and give the same bits for any number of them.
void norm_gate_forward(const NormGateProblem&, const NormGateInputs&, void* out, int threads);
int64_t norm_gate_backward_parts(const NormGateProblem&, const NormGateInputs&);
void norm_gate_backward(const NormGateProblem&, const NormGateInputs&, const NormGateGradients&, int threads);
}  // namespace cpu

namespace cuda {
// One kernel each, on the current device and `stream` (a cudaStream_t), without synchronizing. Throw
// std::runtime_error with CUDA's message on failure.
void norm_gate_forward(const NormGateProblem&, const NormGateInputs&, void* out, void* stream);
int64_t norm_gate_backward_parts(const NormGateProblem&, const NormGateInputs&);
void norm_gate_backward(const NormGateProblem&, const NormGateInputs&, const NormGateGradients&, void* stream);
}  // namespace cuda

}  // namespace diffmf
