// depthwise_conv_silu: a memory-bound stencil on channels-last images.
//
// A thread owns VEC neighbouring channels (one load) of COLS neighbouring columns and walks down a strip of rows. Each
// row it loads, COLS + K - 1 pixels, is added at once to the K output rows that see it, whose sums stay in registers
// with the weights; the next row's loads are under way meanwhile. So device memory is read once (the neighbours'
// overlap hits L1), and only the strips' edges are read twice.
//
// Grid: x = (batch item, strip of rows, tile of columns), y = group of channels, z = modality. In a block, `lanes`
// neighbouring threads cover the group's channels, the rest the tile's columns.
//
// Backward: `convolve` again gives g = dy * silu'(pre), rounded to the activations' type; `backpropagate` walks over g
// in the same way with the weights turned around, which gives dx, and multiplies the same pixels of g with x for
// dweight. Every block writes its own partial sum, added up in the order of its threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "diffmf/depthwise_conv_silu.h"
#include "launch.cuh"
#include "pixels.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLanes = 32;
constexpr int kMaxStrip = 64, kMinStrip = 8;  // rows; a strip reads K - 1 rows more

struct ConvParams {
  int batch, height, width, channels;
  int lane_shift;             // log2 of the threads along the channels
  int strip, strips, across;  // rows of a strip, strips of an image, tiles of columns
  const void* x;              // [M, B, H, W, D]
  Strides x_strides;          // in elements
  const float* weight;        // [M, D, K, K]
  const float* bias;          // [M, D] or null
  const void* dy;             // [M, B, H, W, D]
  void* out;                  // y, g or dx, [M, B, H, W, D]
  const void* g;              // [M, B, H, W, D]
  float *dweight, *dbias;     // [parts, M, D, K, K], [parts, M, D] or null
};

// Where a thread works.
struct Place {
  int m, b, c, column, first, last;  // first channel and column; rows [first, last)
  bool exists;

  __device__ Place(const ConvParams& p, int vec, int cols) {
    const int lanes = 1 << p.lane_shift, seats = kThreads >> p.lane_shift;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), seat = static_cast<int>(threadIdx.x) >> p.lane_shift;
    const int tile = static_cast<int>(blockIdx.x);
    const int strip_index = tile / p.across;
    m = static_cast<int>(blockIdx.z);
    b = strip_index / p.strips;
    c = (static_cast<int>(blockIdx.y) * lanes + lane) * vec;
    column = ((tile - strip_index * p.across) * seats + seat) * cols;
    first = (strip_index - b * p.strips) * p.strip;
    last = min(first + p.strip, p.height);
    exists = c < p.channels && column < p.width;
  }
  __device__ int64_t image(const ConvParams& p) const { return int64_t{m} * p.batch + b; }
};

// The group's weights as rows of channels, one row per tap, the bias after them; by the whole block.
template <int K, int VEC>
__device__ inline void stage_weights(const ConvParams& p, float* to) {
  const int width = VEC << p.lane_shift, first = static_cast<int>(blockIdx.y) * width;
  const int64_t channel = int64_t{blockIdx.z} * p.channels + first;
  for (int i = threadIdx.x; i < width * K * K; i += kThreads) {
    const int c = i / (K * K), tap = i - c * (K * K);
    to[tap * width + c] = first + c < p.channels ? p.weight[channel * (K * K) + i] : 0.f;
  }
  for (int c = threadIdx.x; c < width; c += kThreads)
    to[K * K * width + c] = p.bias != nullptr && first + c < p.channels ? p.bias[channel + c] : 0.f;
  __syncthreads();
}

template <int K, int VEC>
__device__ inline void read_weights(const ConvParams& p, const float* staged, float (&w)[K * K][VEC],
                                    float (&bias)[VEC]) {
  const int width = VEC << p.lane_shift, at = (static_cast<int>(threadIdx.x) & ((1 << p.lane_shift) - 1)) * VEC;
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) widen<VEC>(load_pack<VEC>(staged + tap * width + at), w[tap]);
  widen<VEC>(load_pack<VEC>(staged + K * K * width + at), bias);
}

// COUNT pixels of a row from column `column` on; zeros outside the image.
template <int COUNT, int VEC, typename T>
__device__ inline void load_pixels(const ConvParams& p, const T* row, int64_t stride, bool inside, int column,
                                   Pack<T, VEC> (&to)[COUNT]) {
#pragma unroll
  for (int q = 0; q < COUNT; ++q) {
    const bool exists = inside && column + q >= 0 && column + q < p.width;
    to[q] = exists ? load_pack<VEC>(row + (column + q) * stride) : zero_pack<VEC, T>();
  }
}

// kGradient false: out = silu(pre). true: out = dy * silu'(pre).
template <typename T, int K, int VEC, int COLS, bool kGradient>
__global__ void __launch_bounds__(kThreads, K > 5 ? 1 : 2) convolve(const __grid_constant__ ConvParams p) {
  constexpr int kPad = (K - 1) / 2, kSpan = COLS + K - 1;
  __shared__ alignas(16) float staged[(K * K + 1) * kMaxLanes * VEC];
  stage_weights<K, VEC>(p, staged);
  const Place at(p, VEC, COLS);
  if (!at.exists) return;
  float w[K * K][VEC], bias[VEC];
  read_weights<K, VEC>(p, staged, w, bias);

  const Strides& strides = p.x_strides;
  const T* x = static_cast<const T*>(p.x) + at.m * strides.modality + at.b * strides.batch + at.c;
  // Row 0 of the outputs' image, at the thread's first column.
  const int64_t corner = (at.image(p) * p.height * p.width + at.column) * p.channels + at.c;
  const int64_t out_row = int64_t{p.width} * p.channels;
  T* out = static_cast<T*>(p.out) + corner;
  const T* dy = kGradient ? static_cast<const T*>(p.dy) + corner : nullptr;

  // sums[i]: of the output row that sees the current row through row i of the kernel.
  float sums[K][COLS][VEC];
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int q = 0; q < COLS; ++q)
#pragma unroll
      for (int v = 0; v < VEC; ++v) sums[i][q][v] = bias[v];

  Pack<T, VEC> next[kSpan];
  const int begin = at.first - kPad, end = at.last + kPad;
  load_pixels(p, x + begin * strides.row, strides.column, begin >= 0 && begin < p.height, at.column - kPad, next);
#pragma unroll K
  for (int r = begin; r < end; ++r) {
    float pixels[kSpan][VEC];
#pragma unroll
    for (int q = 0; q < kSpan; ++q) widen<VEC>(next[q], pixels[q]);
    load_pixels(p, x + (r + 1) * strides.row, strides.column, r + 1 < end && r + 1 >= 0 && r + 1 < p.height,
                at.column - kPad, next);
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j)
#pragma unroll
        for (int q = 0; q < COLS; ++q)
#pragma unroll
          for (int v = 0; v < VEC; ++v) sums[i][q][v] = fmaf(w[i * K + j][v], pixels[q + j][v], sums[i][q][v]);

    const int row = r - kPad;  // complete now
    if (row >= at.first) {
#pragma unroll
      for (int q = 0; q < COLS; ++q) {
        if (at.column + q >= p.width) continue;
        const int64_t to = row * out_row + int64_t{q} * p.channels;
        float result[VEC], upstream[VEC];
        if constexpr (kGradient) widen<VEC>(load_pack<VEC>(dy + to), upstream);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const float pre = sums[K - 1][q][v], s = sigmoid(pre);
          result[v] = kGradient ? upstream[v] * silu_slope(pre, s) : pre * s;
        }
        store_pack<VEC>(out + to, result);
      }
    }
#pragma unroll
    for (int i = K - 1; i >= 0; --i)
#pragma unroll
      for (int q = 0; q < COLS; ++q)
#pragma unroll
        for (int v = 0; v < VEC; ++v) sums[i][q][v] = i > 0 ? sums[i > 0 ? i - 1 : 0][q][v] : bias[v];
  }
}

// Adds COUNT values of every thread over the threads with the same channels, in the order of the columns, and calls
// write(value, channel within the group, sum). `scratch` holds COUNT * kThreads floats.
template <int COUNT, typename Write>
__device__ inline void sum_over_columns(const ConvParams& p, float* scratch, const float (&values)[COUNT],
                                        Write write) {
  const int lanes = 1 << p.lane_shift;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) scratch[i * kThreads + threadIdx.x] = values[i];
  __syncthreads();
  for (int i = threadIdx.x; i < COUNT * lanes; i += kThreads) {
    const int value = i >> p.lane_shift, lane = i & (lanes - 1);
    float sum = 0.f;
    for (int thread = lane; thread < kThreads; thread += lanes) sum += scratch[value * kThreads + thread];
    write(value, lane, sum);
  }
}

template <typename T, int K, int VEC, int COLS>
__global__ void __launch_bounds__(kThreads, K > 5 ? 1 : 2) backpropagate(const __grid_constant__ ConvParams p) {
  constexpr int kPad = (K - 1) / 2, kSpan = COLS + K - 1;
  constexpr int kStaged = (K * K + 1) * kMaxLanes * VEC, kScratch = K * VEC * kThreads;
  __shared__ alignas(16) float shared[kStaged > kScratch ? kStaged : kScratch];
  stage_weights<K, VEC>(p, shared);
  const Place at(p, VEC, COLS);
  float w[K * K][VEC], dw[K * K][VEC], dbias[VEC];
  read_weights<K, VEC>(p, shared, w, dbias);
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    dbias[v] = 0.f;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) dw[tap][v] = 0.f;
  }

  if (at.exists) {
    const Strides& strides = p.x_strides;
    const T* x = static_cast<const T*>(p.x) + at.m * strides.modality + at.b * strides.batch + at.c;
    const int64_t corner = at.image(p) * p.height * p.width * p.channels + at.c;
    const int64_t row_stride = int64_t{p.width} * p.channels;
    const T* g = static_cast<const T*>(p.g) + corner;
    T* dx = static_cast<T*>(p.out) + corner + int64_t{at.column} * p.channels;

    // sums[i] and inputs[i]: dx and x of the row that sees the current row of g through row K - 1 - i of the kernel;
    // rows of x that another strip owns count as zero.
    float sums[K][COLS][VEC] = {}, inputs[K][COLS][VEC] = {};
    Pack<T, VEC> next[kSpan], next_input[COLS];
    const int begin = at.first - kPad, end = at.last + kPad;
    const auto load = [&](int r) {
      load_pixels(p, g + r * row_stride, int64_t{p.channels}, r < end && r >= 0 && r < p.height, at.column - kPad,
                  next);
      const int input = r + kPad;
      load_pixels(p, x + input * strides.row, strides.column, input < at.last, at.column, next_input);
    };
    load(begin);
#pragma unroll K
    for (int r = begin; r < end; ++r) {
      float pixels[kSpan][VEC];
#pragma unroll
      for (int q = 0; q < kSpan; ++q) widen<VEC>(next[q], pixels[q]);
#pragma unroll
      for (int q = 0; q < COLS; ++q) widen<VEC>(next_input[q], inputs[0][q]);
      load(r + 1);
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j < K; ++j)
#pragma unroll
          for (int q = 0; q < COLS; ++q)
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              const int tap = K * K - 1 - (i * K + j);
              sums[i][q][v] = fmaf(w[tap][v], pixels[q + j][v], sums[i][q][v]);
              dw[tap][v] = fmaf(inputs[i][q][v], pixels[q + j][v], dw[tap][v]);
            }
      if (r >= at.first && r < at.last) {
#pragma unroll
        for (int q = 0; q < COLS; ++q)
#pragma unroll
          for (int v = 0; v < VEC; ++v) dbias[v] += pixels[q + kPad][v];
      }
      const int row = r - kPad;  // complete now
      if (row >= at.first) {
#pragma unroll
        for (int q = 0; q < COLS; ++q)
          if (at.column + q < p.width) store_pack<VEC>(dx + row * row_stride + int64_t{q} * p.channels, sums[K - 1][q]);
      }
#pragma unroll
      for (int i = K - 1; i >= 0; --i)
#pragma unroll
        for (int q = 0; q < COLS; ++q)
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            sums[i][q][v] = i > 0 ? sums[i > 0 ? i - 1 : 0][q][v] : 0.f;
            if (i > 0) inputs[i][q][v] = inputs[i > 0 ? i - 1 : 0][q][v];
          }
    }
  }

  // [parts, M, D] of the group's first channel in this block's part.
  const int first = static_cast<int>(blockIdx.y) * (VEC << p.lane_shift);
  const int64_t channel = (int64_t{blockIdx.x} * gridDim.z + blockIdx.z) * p.channels + first;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float values[K * VEC];
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int v = 0; v < VEC; ++v) values[j * VEC + v] = dw[i * K + j][v];
    sum_over_columns(p, shared, values, [&](int value, int lane, float sum) {
      const int c = lane * VEC + value % VEC;
      if (first + c < p.channels) p.dweight[(channel + c) * (K * K) + i * K + value / VEC] = sum;
    });
  }
  if (p.dbias != nullptr) {
    sum_over_columns(p, shared, dbias, [&](int value, int lane, float sum) {
      const int c = lane * VEC + value;
      if (first + c < p.channels) p.dbias[channel + c] = sum;
    });
  }
}

// Channels and columns of a thread in either direction, where channels come in aligned packs of that many; the tap
// counts of larger kernels leave registers for one channel only.
constexpr int kForwardVec = 4, kForwardCols = 2, kBackwardVec = 2, kBackwardCols = 2;

bool packs(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, const void* dy, int vec) {
  const int64_t bytes = (problem.dtype == DType::f32 ? 4 : 2) * vec;
  const Strides& s = inputs.x_strides;
  return problem.kernel_size == 3 && problem.channels % vec == 0 &&
         (s.modality % vec | s.batch % vec | s.row % vec | s.column % vec) == 0 &&
         (reinterpret_cast<uintptr_t>(inputs.x) | reinterpret_cast<uintptr_t>(dy)) % bytes == 0;
}

// The grid, and where in params the kernels find it.
dim3 lay_out(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, int vec, int cols,
             ConvParams& params) {
  params.batch = static_cast<int>(problem.batch);
  params.height = static_cast<int>(problem.height);
  params.width = static_cast<int>(problem.width);
  params.channels = static_cast<int>(problem.channels);
  params.x = inputs.x;
  params.x_strides = inputs.x_strides;
  params.weight = static_cast<const float*>(inputs.weight);
  params.bias = static_cast<const float*>(inputs.bias);
  // As many lanes as divide the channels, or, where that is few, as waste least; 64 channels at most for coalescing.
  const int64_t vectors = ceil_div(problem.channels, vec);
  int64_t lanes = std::gcd(vectors, int64_t{vec >= 4 ? 16 : kMaxLanes});
  if (lanes < 8) lanes = vec >= 4 ? 16 : kMaxLanes;
  while (lanes / 2 >= vectors) lanes /= 2;
  params.lane_shift = shift_of(lanes);
  const int64_t groups = ceil_div(vectors, lanes), seats = kThreads / lanes;
  params.across = static_cast<int>(ceil_div(problem.width, seats * cols));
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const auto blocks = [&](int64_t strip) { return problem.batch * params.across * ceil_div(problem.height, strip); };
  // Tall strips read little twice; but several blocks for every multiprocessor.
  int strip = kMaxStrip;
  while (strip > kMinStrip && blocks(strip) * groups * problem.modalities < 6 * multiprocessors) strip /= 2;
  params.strip = strip;
  params.strips = static_cast<int>(ceil_div(problem.height, strip));
  if (blocks(strip) > std::numeric_limits<int>::max() || groups > 65535)
    throw std::runtime_error("depthwise_conv_silu: the tensor needs more blocks than a grid has");
  return dim3(static_cast<unsigned>(blocks(strip)), static_cast<unsigned>(groups),
              static_cast<unsigned>(problem.modalities));
}

void launch(void (*kernel)(ConvParams), dim3 grid, const ConvParams& params, void* stream) {
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "depthwise_conv_silu launch");
}

[[noreturn]] void refuse_kernel_size(const DepthwiseConvProblem& problem) {
  throw std::runtime_error("depthwise_conv_silu: kernel_size " + std::to_string(problem.kernel_size));
}

template <typename T, bool kGradient>
void run_convolve(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, const void* dy, void* out,
                  void* stream) {
  const bool packed = packs(problem, inputs, dy, kForwardVec);
  ConvParams params = {};
  const dim3 grid = lay_out(problem, inputs, packed ? kForwardVec : 1, packed ? kForwardCols : 1, params);
  params.dy = dy;
  params.out = out;
  if (packed) return launch(convolve<T, 3, kForwardVec, kForwardCols, kGradient>, grid, params, stream);
  switch (problem.kernel_size) {
    case 1:
      return launch(convolve<T, 1, 1, 1, kGradient>, grid, params, stream);
    case 3:
      return launch(convolve<T, 3, 1, 1, kGradient>, grid, params, stream);
    case 5:
      return launch(convolve<T, 5, 1, 1, kGradient>, grid, params, stream);
    case 7:
      return launch(convolve<T, 7, 1, 1, kGradient>, grid, params, stream);
  }
  refuse_kernel_size(problem);
}

template <typename T>
void run_backward(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs,
                  const DepthwiseConvGradients& gradients, void* workspace, void* stream) {
  run_convolve<T, true>(problem, inputs, gradients.dy, workspace, stream);
  const bool packed = packs(problem, inputs, nullptr, kBackwardVec);
  ConvParams params = {};
  const dim3 grid = lay_out(problem, inputs, packed ? kBackwardVec : 1, packed ? kBackwardCols : 1, params);
  params.g = workspace;
  params.out = gradients.dx;
  params.dweight = static_cast<float*>(gradients.dweight);
  params.dbias = static_cast<float*>(gradients.dbias);
  if (packed) return launch(backpropagate<T, 3, kBackwardVec, kBackwardCols>, grid, params, stream);
  switch (problem.kernel_size) {
    case 1:
      return launch(backpropagate<T, 1, 1, 1>, grid, params, stream);
    case 3:
      return launch(backpropagate<T, 3, 1, 1>, grid, params, stream);
    case 5:
      return launch(backpropagate<T, 5, 1, 1>, grid, params, stream);
    case 7:
      return launch(backpropagate<T, 7, 1, 1>, grid, params, stream);
  }
  refuse_kernel_size(problem);
}

}  // namespace

void depthwise_conv_silu_forward(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, void* y,
                                 void* stream) {
  switch (problem.dtype) {
    case DType::f32:
      return run_convolve<float, false>(problem, inputs, nullptr, y, stream);
    case DType::bf16:
      return run_convolve<__nv_bfloat16, false>(problem, inputs, nullptr, y, stream);
    case DType::f16:
      return run_convolve<__half, false>(problem, inputs, nullptr, y, stream);
    default:
      throw std::runtime_error("depthwise_conv_silu: float64 runs on the CPU only");
  }
}

size_t depthwise_conv_silu_backward_workspace(const DepthwiseConvProblem& problem) {
  return static_cast<size_t>(problem.elements()) * (problem.dtype == DType::f32 ? 4 : 2);
}

int64_t depthwise_conv_silu_backward_parts(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs) {
  const bool packed = packs(problem, inputs, nullptr, kBackwardVec);
  ConvParams params = {};
  return lay_out(problem, inputs, packed ? kBackwardVec : 1, packed ? kBackwardCols : 1, params).x;
}

void depthwise_conv_silu_backward(const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs,
                                  const DepthwiseConvGradients& gradients, void* workspace, void* stream) {
  switch (problem.dtype) {
    case DType::f32:
      return run_backward<float>(problem, inputs, gradients, workspace, stream);
    case DType::bf16:
      return run_backward<__nv_bfloat16>(problem, inputs, gradients, workspace, stream);
    case DType::f16:
      return run_backward<__half>(problem, inputs, gradients, workspace, stream);
    default:
      throw std::runtime_error("depthwise_conv_silu: float64 runs on the CPU only");
  }
}

}  // namespace cuda
}  // namespace diffmf
