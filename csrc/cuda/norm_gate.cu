// norm_gate: a memory-bound pass over pixels.
//
// `lanes` neighbouring threads (a power of two, at most a warp) hold one pixel: VEC neighbouring channels each, PER
// times. A pixel is read once, its mean and then the sum of squared distances from the mean are added up by shuffles
// (in an order that the shape fixes), and it is written once. The groups of threads walk over the pixels of a modality
// with the grid's stride; blockIdx.y is the modality.
//
// Backward computes the statistics again. A thread keeps the parameter gradients of its channels in registers and the
// block adds them up in the order of its groups: one part per block. Where a pixel does not fit in registers (PER = 0)
// channels are read again for every pass, and each group owns a part, to which its threads add in memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "diffmf/norm_gate.h"
#include "launch.cuh"
#include "pixels.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kVec = 4;  // channels of a load where alignment allows

struct NormParams {
  int64_t pixels;
  int channels, lane_shift;  // log2(lanes)
  float eps;
  const void* y;  // [M, P, D]
  const void* z;  // [M, P, D]
  PixelStrides y_strides, z_strides;
  const float* weight;     // [M, D]
  const float* bias;       // [M, D]
  const void* dout;        // [M, P, D]
  void *out, *dy, *dz;     // [M, P, D]
  float *dweight, *dbias;  // [parts, M, D]
};

// The sum over the `lanes` threads of a group; all threads of the warp take part.
__device__ inline float group_sum(float v, int lanes) {
  for (int i = lanes / 2; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

// A thread's place: first channel, and the pixels of its group. Whole warps go through the same number of pixels.
struct Walk {
  int lanes, first, stride;  // channels first, first + stride, ... (in packs)
  int64_t group, groups;
  __device__ Walk(const NormParams& p, int vec) {
    lanes = 1 << p.lane_shift;
    first = (static_cast<int>(threadIdx.x) & (lanes - 1)) * vec;
    stride = lanes * vec;
    group = (int64_t{blockIdx.x} * kThreads + threadIdx.x) >> p.lane_shift;
    groups = (int64_t{gridDim.x} * kThreads) >> p.lane_shift;
  }
  __device__ int64_t rounds(const NormParams& p) const { return (p.pixels + groups - 1) / groups; }
};

struct Statistics {
  float mean, rstd;
};

// PER packs of a pixel's channels as float; zero where the pixel or the channels do not exist.
template <int VEC, int PER, typename T>
__device__ inline void read_pixel(const NormParams& p, const Walk& walk, const T* pixel, bool exists,
                                  float (&to)[PER][VEC]) {
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int c = walk.first + i * walk.stride;
    widen<VEC>(exists && c < p.channels ? load_pack<VEC>(pixel + c) : zero_pack<VEC, T>(), to[i]);
  }
}

template <int VEC, int PER>
__device__ inline Statistics statistics_of(const NormParams& p, const Walk& walk, const float (&y)[PER][VEC]) {
  float sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum += y[i][v];
  const float mean = group_sum(sum, walk.lanes) / p.channels;
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float distance = walk.first + i * walk.stride < p.channels ? y[i][v] - mean : 0.f;
      squares = fmaf(distance, distance, squares);
    }
  return {mean, rsqrtf(group_sum(squares, walk.lanes) / p.channels + p.eps)};
}

// The same for a pixel in memory, one channel at a time.
template <typename T>
__device__ inline Statistics statistics_of(const NormParams& p, const Walk& walk, const T* y, bool exists) {
  float sum = 0.f, squares = 0.f;
  const int channels = exists ? p.channels : 0;
  for (int c = walk.first; c < channels; c += walk.stride) sum += widen(y[c]);
  const float mean = group_sum(sum, walk.lanes) / p.channels;
  for (int c = walk.first; c < channels; c += walk.stride) {
    const float distance = widen(y[c]) - mean;
    squares = fmaf(distance, distance, squares);
  }
  return {mean, rsqrtf(group_sum(squares, walk.lanes) / p.channels + p.eps)};
}

template <typename T>
struct Images {
  const T *y, *z;
  int64_t m;
  __device__ explicit Images(const NormParams& p)
      : y(static_cast<const T*>(p.y) + int64_t{blockIdx.y} * p.y_strides.modality),
        z(static_cast<const T*>(p.z) + int64_t{blockIdx.y} * p.z_strides.modality),
        m(blockIdx.y) {}
  // Pixel of a contiguous tensor, in elements.
  __device__ int64_t at(const NormParams& p, int64_t pixel) const { return (m * p.pixels + pixel) * p.channels; }
};

template <typename T, int VEC, int PER, bool kGate>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ NormParams p) {
  const Walk walk(p, VEC);
  const Images<T> images(p);
  const float* weight = p.weight + images.m * p.channels;
  const float* bias = p.bias + images.m * p.channels;
  float w[PER][VEC], b[PER][VEC];
  read_pixel<VEC, PER>(p, walk, weight, true, w);
  read_pixel<VEC, PER>(p, walk, bias, true, b);
  const int64_t rounds = walk.rounds(p);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t pixel = round * walk.groups + walk.group;
    const bool exists = pixel < p.pixels;
    float y[PER][VEC], z[PER][VEC];
    read_pixel<VEC, PER>(p, walk, images.y + pixel * p.y_strides.pixel, exists, y);
    if constexpr (kGate) read_pixel<VEC, PER>(p, walk, images.z + pixel * p.z_strides.pixel, exists, z);
    const Statistics s = statistics_of(p, walk, y);
    T* out = static_cast<T*>(p.out) + images.at(p, pixel);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int c = walk.first + i * walk.stride;
      if (!exists || c >= p.channels) continue;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        y[i][v] = fmaf((y[i][v] - s.mean) * s.rstd, w[i][v], b[i][v]);
        if constexpr (kGate) y[i][v] *= z[i][v] * sigmoid(z[i][v]);
      }
      store_pack<VEC>(out + c, y[i]);
    }
  }
}

template <typename T, bool kGate>
__global__ void __launch_bounds__(kThreads) forward_kernel_wide(const __grid_constant__ NormParams p) {
  const Walk walk(p, 1);
  const Images<T> images(p);
  const float* weight = p.weight + images.m * p.channels;
  const float* bias = p.bias + images.m * p.channels;
  const int64_t rounds = walk.rounds(p);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t pixel = round * walk.groups + walk.group;
    const bool exists = pixel < p.pixels;
    const T* y = images.y + pixel * p.y_strides.pixel;
    const Statistics s = statistics_of(p, walk, y, exists);
    if (!exists) continue;
    T* out = static_cast<T*>(p.out) + images.at(p, pixel);
    for (int c = walk.first; c < p.channels; c += walk.stride) {
      float value = fmaf((widen(y[c]) - s.mean) * s.rstd, weight[c], bias[c]);
      if constexpr (kGate) {
        const float z = widen(images.z[pixel * p.z_strides.pixel + c]);
        value *= z * sigmoid(z);
      }
      narrow(value, out[c]);
    }
  }
}

// What one channel of a pixel contributes.
struct Slopes {
  float gated;  // gradient of the normalized and scaled value
  float dz;
};
template <bool kGate>
__device__ inline Slopes gate_slopes(float dout, float affine, float z) {
  if constexpr (!kGate) return {dout, 0.f};
  const float s = sigmoid(z);
  return {dout * z * s, dout * affine * silu_slope(z, s)};
}

template <typename T, int VEC, int PER, bool kGate>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ NormParams p) {
  __shared__ float scratch[2 * VEC * kThreads];
  const Walk walk(p, VEC);
  const Images<T> images(p);
  float w[PER][VEC], b[PER][VEC], dw[PER][VEC] = {}, db[PER][VEC] = {};
  read_pixel<VEC, PER>(p, walk, p.weight + images.m * p.channels, true, w);
  read_pixel<VEC, PER>(p, walk, p.bias + images.m * p.channels, true, b);
  const int64_t rounds = walk.rounds(p);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t pixel = round * walk.groups + walk.group;
    const bool exists = pixel < p.pixels;
    const int64_t at = images.at(p, pixel);
    float n[PER][VEC], z[PER][VEC] = {}, d[PER][VEC];
    read_pixel<VEC, PER>(p, walk, images.y + pixel * p.y_strides.pixel, exists, n);
    if constexpr (kGate) read_pixel<VEC, PER>(p, walk, images.z + pixel * p.z_strides.pixel, exists, z);
    read_pixel<VEC, PER>(p, walk, static_cast<const T*>(p.dout) + at, exists, d);
    const Statistics s = statistics_of(p, walk, n);
    float sum = 0.f, projection = 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int c = walk.first + i * walk.stride;
      if (!exists || c >= p.channels) continue;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        n[i][v] = (n[i][v] - s.mean) * s.rstd;
        const Slopes slopes = gate_slopes<kGate>(d[i][v], fmaf(n[i][v], w[i][v], b[i][v]), z[i][v]);
        dw[i][v] = fmaf(slopes.gated, n[i][v], dw[i][v]);
        db[i][v] += slopes.gated;
        d[i][v] = slopes.gated * w[i][v];
        z[i][v] = slopes.dz;
        sum += d[i][v];
        projection = fmaf(d[i][v], n[i][v], projection);
      }
      if constexpr (kGate) store_pack<VEC>(static_cast<T*>(p.dz) + at + c, z[i]);
    }
    const float mean = group_sum(sum, walk.lanes) / p.channels;
    const float slope = group_sum(projection, walk.lanes) / p.channels;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int c = walk.first + i * walk.stride;
      if (!exists || c >= p.channels) continue;
#pragma unroll
      for (int v = 0; v < VEC; ++v) d[i][v] = s.rstd * (d[i][v] - mean - n[i][v] * slope);
      store_pack<VEC>(static_cast<T*>(p.dy) + at + c, d[i]);
    }
  }

  const int64_t part = (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * p.channels;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    __syncthreads();
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      scratch[v * kThreads + threadIdx.x] = dw[i][v];
      scratch[(VEC + v) * kThreads + threadIdx.x] = db[i][v];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 2 * VEC * walk.lanes; j += kThreads) {
      const int value = j >> p.lane_shift, lane = j & (walk.lanes - 1);
      const int c = lane * VEC + i * walk.stride + value % VEC;
      if (c >= p.channels) continue;
      float sum = 0.f;
      for (int thread = lane; thread < kThreads; thread += walk.lanes) sum += scratch[value * kThreads + thread];
      (value < VEC ? p.dweight : p.dbias)[part + c] = sum;
    }
  }
}

template <typename T, bool kGate>
__global__ void __launch_bounds__(kThreads) backward_kernel_wide(const __grid_constant__ NormParams p) {
  const Walk walk(p, 1);
  const Images<T> images(p);
  const float* weight = p.weight + images.m * p.channels;
  const float* bias = p.bias + images.m * p.channels;
  const int64_t part = (walk.group * gridDim.y + images.m) * p.channels;
  float *dweight = p.dweight + part, *dbias = p.dbias + part;
  for (int c = walk.first; c < p.channels; c += walk.stride) dweight[c] = dbias[c] = 0.f;
  const int64_t rounds = walk.rounds(p);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t pixel = round * walk.groups + walk.group;
    const bool exists = pixel < p.pixels;
    const int64_t at = images.at(p, pixel);
    const T* y = images.y + pixel * p.y_strides.pixel;
    const T* z = images.z + pixel * p.z_strides.pixel;
    const T* dout = static_cast<const T*>(p.dout) + at;
    const Statistics s = statistics_of(p, walk, y, exists);
    const int channels = exists ? p.channels : 0;
    const auto slopes_of = [&](int c, float n) {
      return gate_slopes<kGate>(widen(dout[c]), fmaf(n, weight[c], bias[c]), kGate ? widen(z[c]) : 0.f);
    };
    float sum = 0.f, projection = 0.f;
    for (int c = walk.first; c < channels; c += walk.stride) {
      const float n = (widen(y[c]) - s.mean) * s.rstd;
      const Slopes slopes = slopes_of(c, n);
      dweight[c] += slopes.gated * n;
      dbias[c] += slopes.gated;
      if constexpr (kGate) narrow(slopes.dz, static_cast<T*>(p.dz)[at + c]);
      sum += slopes.gated * weight[c];
      projection = fmaf(slopes.gated * weight[c], n, projection);
    }
    const float mean = group_sum(sum, walk.lanes) / p.channels;
    const float slope = group_sum(projection, walk.lanes) / p.channels;
    for (int c = walk.first; c < channels; c += walk.stride) {
      const float n = (widen(y[c]) - s.mean) * s.rstd;
      narrow(s.rstd * (slopes_of(c, n).gated * weight[c] - mean - n * slope), static_cast<T*>(p.dy)[at + c]);
    }
  }
}

// How a pixel lies over threads: per == 0 for the kernels that keep nothing in registers.
struct PixelLayout {
  int lane_shift, per;
  unsigned blocks;
  int64_t parts;  // of the backward pass
};

bool packs(const NormGateProblem& problem, const NormGateInputs& inputs) {
  const auto misfit = [](const void* data, const PixelStrides& s, uintptr_t bytes) {
    return data != nullptr &&
           (reinterpret_cast<uintptr_t>(data) % bytes != 0 || s.pixel % kVec != 0 || s.modality % kVec != 0);
  };
  const uintptr_t bytes = (problem.dtype == DType::f32 ? 4 : 2) * kVec;
  const PixelStrides parameters = {problem.channels, problem.channels};
  return problem.channels % kVec == 0 && !misfit(inputs.y, inputs.y_strides, bytes) &&
         !misfit(inputs.z, inputs.z_strides, bytes) && !misfit(inputs.weight, parameters, 16) &&
         !misfit(inputs.bias, parameters, 16);
}

PixelLayout lay_out(const NormGateProblem& problem, const NormGateInputs& inputs, bool backward) {
  PixelLayout layout = {5, 0, 0, 0};
  if (packs(problem, inputs)) {
    const int64_t vectors = problem.channels / kVec;
    int64_t least = 4 * kWarp + 1;
    for (const int per : {1, 2, 4}) {  // the one that leaves fewest threads without channels
      int shift = 0;
      while ((int64_t{per} << shift) < vectors) ++shift;
      if (shift > 5 || (int64_t{per} << shift) >= least) continue;
      least = int64_t{per} << shift;
      layout.lane_shift = shift;
      layout.per = per;
    }
  }
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int64_t group_count = kThreads >> layout.lane_shift;
  const int64_t most = int64_t{multiprocessors} * (layout.per == 0 && backward ? 2 : 8);
  layout.blocks = static_cast<unsigned>(std::min(ceil_div(problem.pixels, group_count), most));
  layout.parts = layout.per == 0 ? layout.blocks * group_count : layout.blocks;
  return layout;
}

NormParams make_params(const NormGateProblem& problem, const NormGateInputs& inputs, const PixelLayout& layout) {
  NormParams params = {};
  params.pixels = problem.pixels;
  params.channels = static_cast<int>(problem.channels);
  params.lane_shift = layout.lane_shift;
  params.eps = static_cast<float>(problem.eps);
  params.y = inputs.y;
  params.z = inputs.z;
  params.y_strides = inputs.y_strides;
  params.z_strides = inputs.z_strides;
  params.weight = static_cast<const float*>(inputs.weight);
  params.bias = static_cast<const float*>(inputs.bias);
  return params;
}

void launch(void (*kernel)(NormParams), const NormGateProblem& problem, const PixelLayout& layout,
            const NormParams& params, void* stream) {
  const dim3 grid(layout.blocks, static_cast<unsigned>(problem.modalities));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "norm_gate launch");
}

template <typename T, bool kGate>
void run_forward(const NormGateProblem& problem, const NormGateInputs& inputs, void* out, void* stream) {
  PixelLayout layout = lay_out(problem, inputs, false);
  NormParams params = make_params(problem, inputs, layout);
  params.out = out;
  const auto kernel = layout.per == 1   ? forward_kernel<T, kVec, 1, kGate>
                      : layout.per == 2 ? forward_kernel<T, kVec, 2, kGate>
                      : layout.per == 4 ? forward_kernel<T, kVec, 4, kGate>
                                        : forward_kernel_wide<T, kGate>;
  launch(kernel, problem, layout, params, stream);
}

template <typename T, bool kGate>
void run_backward(const NormGateProblem& problem, const NormGateInputs& inputs, const NormGateGradients& gradients,
                  void* stream) {
  const PixelLayout layout = lay_out(problem, inputs, true);
  NormParams params = make_params(problem, inputs, layout);
  params.dout = gradients.dout;
  params.dy = gradients.dy;
  params.dz = gradients.dz;
  params.dweight = static_cast<float*>(gradients.dweight);
  params.dbias = static_cast<float*>(gradients.dbias);
  const auto kernel = layout.per == 1   ? backward_kernel<T, kVec, 1, kGate>
                      : layout.per == 2 ? backward_kernel<T, kVec, 2, kGate>
                      : layout.per == 4 ? backward_kernel<T, kVec, 4, kGate>
                                        : backward_kernel_wide<T, kGate>;
  launch(kernel, problem, layout, params, stream);
}

// Calls f with a null pointer to the element type.
template <typename Function>
void with_element(DType dtype, Function f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<__half*>(nullptr));
    default:
      throw std::runtime_error("norm_gate: float64 runs on the CPU only");
  }
}

}  // namespace

void norm_gate_forward(const NormGateProblem& problem, const NormGateInputs& inputs, void* out, void* stream) {
  with_element(problem.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    inputs.z != nullptr ? run_forward<T, true>(problem, inputs, out, stream)
                        : run_forward<T, false>(problem, inputs, out, stream);
  });
}

int64_t norm_gate_backward_parts(const NormGateProblem& problem, const NormGateInputs& inputs) {
  return lay_out(problem, inputs, true).parts;
}

void norm_gate_backward(const NormGateProblem& problem, const NormGateInputs& inputs,
                        const NormGateGradients& gradients, void* stream) {
  with_element(problem.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    inputs.z != nullptr ? run_backward<T, true>(problem, inputs, gradients, stream)
                        : run_backward<T, false>(problem, inputs, gradients, stream);
  });
}

}  // namespace cuda
}  // namespace diffmf
