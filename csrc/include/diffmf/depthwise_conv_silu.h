// depthwise_conv_silu: a depthwise convolution of channels-last images with zero padding, then SiLU.
//
//     pre[m,b,h,w,d] = bias[m,d] + sum_{i,j} weight[m,d,i,j] * x[m, b, h+i-k/2, w+j-k/2, d]      (zero outside)
//     y              = pre * sigmoid(pre)
//
// Every pointer is a plain device or host pointer; the caller allocates everything. Arithmetic is float (double when
// dtype == f64, host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include "diffmf/ss2d.h"

namespace diffmf {

struct DepthwiseConvProblem {
  DType dtype;  // of x and y
  int64_t modalities, batch, height, width, channels;
  int kernel_size;  // k: 1, 3, 5 or 7

  int64_t elements() const { return modalities * batch * height * width * channels; }
};

struct DepthwiseConvInputs {
  const void* x;       // [M, B, H, W, D], dtype; the channels of a pixel are contiguous
  Strides x_strides;   // `path` is not used
  const void* weight;  // [M, D, k, k], float (double for f64)
  const void* bias;    // [M, D]; may be null
};

// The parameter gradients come as `parts` partial sums to be added along the first axis.
struct DepthwiseConvGradients {
  const void* dy;  // [M, B, H, W, D] contiguous, dtype
  void* dx;        // [M, B, H, W, D] contiguous, dtype
  void* dweight;   // [parts, M, D, k, k], float
  void* dbias;     // [parts, M, D], float; null when bias is null
};

namespace cpu {
// Both run on `threads` threads and give the same bits for any number of them.
void depthwise_conv_silu_forward(const DepthwiseConvProblem&, const DepthwiseConvInputs&, void* y, int threads);
int64_t depthwise_conv_silu_backward_parts(const DepthwiseConvProblem&, const DepthwiseConvInputs&);
void depthwise_conv_silu_backward(const DepthwiseConvProblem&, const DepthwiseConvInputs&,
                                  const DepthwiseConvGradients&, int threads);
}  // namespace cpu

namespace cuda {
// On the current device and `stream` (a cudaStream_t), without synchronizing; one kernel forward, two backward, with
// `workspace` between them. Throw std::runtime_error with CUDA's message on failure.
void depthwise_conv_silu_forward(const DepthwiseConvProblem&, const DepthwiseConvInputs&, void* y, void* stream);
size_t depthwise_conv_silu_backward_workspace(const DepthwiseConvProblem&);
int64_t depthwise_conv_silu_backward_parts(const DepthwiseConvProblem&, const DepthwiseConvInputs&);
void depthwise_conv_silu_backward(const DepthwiseConvProblem&, const DepthwiseConvInputs&,
                                  const DepthwiseConvGradients&, void* workspace, void* stream);
}  // namespace cuda

}  // namespace diffmf
