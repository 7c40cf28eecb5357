// cross_scan and cross_merge: memory-bound permutations of images.
//
// A block owns a kSide x kSide square of pixels of one (batch item, channel). The square goes through shared memory, so
// that row paths and column paths both touch device memory in runs of kSide neighbouring elements; reversed paths are
// the same runs backwards. A thread owns whole pixels, so the merge adds the paths of a pixel in order: no atomics.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "diffmf/cross_scan.h"
#include "launch.cuh"
#include "pixels.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kSide = 32;
constexpr int kRows = 8;  // thread rows of a block; each thread owns kSide / kRows pixels of a column

// Scan position of a pixel along a path.
__device__ inline int64_t position_of(const CrossScanProblem& shape, int path, int64_t row, int64_t column) {
  const int64_t q = (path & 1) == 0 ? row * shape.width + column : column * shape.height + row;
  return path >= 2 ? shape.height * shape.width - 1 - q : q;
}

struct Square {
  int64_t image, row, column;  // (batch item, channel) and the square's first pixel
};
__device__ inline Square square_of(const CrossScanProblem& shape, int64_t index) {
  const int64_t across = (shape.width + kSide - 1) / kSide, down = (shape.height + kSide - 1) / kSide;
  return {index / (across * down), index / across % down * kSide, index % across * kSide};
}

template <typename T>
__global__ void __launch_bounds__(kSide* kRows)
    cross_scan_kernel(const __grid_constant__ CrossScanProblem shape, const T* x,  // [B, C, H, W]
                      T* y,                                                        // [B, K, C, H * W]
                      int64_t squares) {
  __shared__ T tile[kSide][kSide + 1];
  const int64_t tokens = shape.height * shape.width;
  for (int64_t index = blockIdx.x; index < squares; index += gridDim.x) {
    const Square at = square_of(shape, index);
    for (int i = threadIdx.y; i < kSide; i += kRows) {
      const int64_t row = at.row + i, column = at.column + threadIdx.x;
      if (row < shape.height && column < shape.width)
        tile[i][threadIdx.x] = x[at.image * tokens + row * shape.width + column];
    }
    __syncthreads();
    const int64_t b = at.image / shape.channels, c = at.image % shape.channels;
    for (int k = 0; k < shape.paths; ++k) {
      T* to = y + ((b * shape.paths + k) * shape.channels + c) * tokens;
      const bool transposed = shape.path[k] & 1;
      for (int i = threadIdx.y; i < kSide; i += kRows) {
        const int u = transposed ? static_cast<int>(threadIdx.x) : i,
                  v = transposed ? i : static_cast<int>(threadIdx.x);
        if (at.row + u < shape.height && at.column + v < shape.width)
          to[position_of(shape, shape.path[k], at.row + u, at.column + v)] = tile[u][v];
      }
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kSide* kRows)
    cross_merge_kernel(const __grid_constant__ CrossScanProblem shape, const T* y,  // [B, K, C, H * W]
                       T* x,                                                        // [B, C, H, W]
                       int64_t squares) {
  __shared__ float tile[kSide][kSide + 1];
  const int64_t tokens = shape.height * shape.width;
  for (int64_t index = blockIdx.x; index < squares; index += gridDim.x) {
    const Square at = square_of(shape, index);
    const int64_t b = at.image / shape.channels, c = at.image % shape.channels;
    float sum[kSide / kRows] = {};
    for (int k = 0; k < shape.paths; ++k) {
      const T* from = y + ((b * shape.paths + k) * shape.channels + c) * tokens;
      const bool transposed = shape.path[k] & 1;
      __syncthreads();
      for (int i = threadIdx.y; i < kSide; i += kRows) {
        const int u = transposed ? static_cast<int>(threadIdx.x) : i,
                  v = transposed ? i : static_cast<int>(threadIdx.x);
        if (at.row + u < shape.height && at.column + v < shape.width)
          tile[u][v] = widen(from[position_of(shape, shape.path[k], at.row + u, at.column + v)]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSide / kRows; ++i) {
        const int64_t row = at.row + threadIdx.y + i * kRows, column = at.column + threadIdx.x;
        if (row < shape.height && column < shape.width) sum[i] += tile[threadIdx.y + i * kRows][threadIdx.x];
      }
    }
#pragma unroll
    for (int i = 0; i < kSide / kRows; ++i) {
      const int64_t row = at.row + threadIdx.y + i * kRows, column = at.column + threadIdx.x;
      if (row < shape.height && column < shape.width) narrow(sum[i], x[at.image * tokens + row * shape.width + column]);
    }
  }
}

template <typename T>
void launch(void (*kernel)(CrossScanProblem, const T*, T*, int64_t), const CrossScanProblem& shape, const void* from,
            void* to, void* stream) {
  const int64_t squares =
      shape.batch * shape.channels * ((shape.height + kSide - 1) / kSide) * ((shape.width + kSide - 1) / kSide);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(squares, 1 << 30));
  kernel<<<grid, dim3(kSide, kRows), 0, static_cast<cudaStream_t>(stream)>>>(shape, static_cast<const T*>(from),
                                                                             static_cast<T*>(to), squares);
  check(cudaGetLastError(), "cross_scan launch");
}

}  // namespace

void cross_scan(const CrossScanProblem& shape, int64_t element_size, const void* x, void* y, void* stream) {
  switch (element_size) {
    case 1:
      return launch(cross_scan_kernel<uint8_t>, shape, x, y, stream);
    case 2:
      return launch(cross_scan_kernel<uint16_t>, shape, x, y, stream);
    case 4:
      return launch(cross_scan_kernel<uint32_t>, shape, x, y, stream);
    case 8:
      return launch(cross_scan_kernel<uint64_t>, shape, x, y, stream);
    default:
      throw std::runtime_error("cross_scan: elements of " + std::to_string(element_size) + " bytes");
  }
}

void cross_merge(const CrossScanProblem& shape, DType dtype, const void* y, void* x, void* stream) {
  switch (dtype) {
    case DType::f32:
      return launch(cross_merge_kernel<float>, shape, y, x, stream);
    case DType::bf16:
      return launch(cross_merge_kernel<__nv_bfloat16>, shape, y, x, stream);
    case DType::f16:
      return launch(cross_merge_kernel<__half>, shape, y, x, stream);
    default:
      throw std::runtime_error("cross_merge: float64 runs on the CPU only");
  }
}

}  // namespace cuda
}  // namespace diffmf
