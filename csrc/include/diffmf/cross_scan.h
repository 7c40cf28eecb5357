// CrossScan and CrossMerge: images to and from one sequence of pixels per path.
//
//     cross_scan:  out[b,k,c,l] = image[b,c,pixel_k(l)]
//     cross_merge: out[b,c,p]   = sum_k y[b,k,c,l_k(p)], in the order of k, l_k(p) being where path k meets pixel p
//
// with l = 0 .. H*W-1 and the path codes of ss2d.h. Tensors are contiguous, the caller allocates them.
#pragma once

#include <cstdint>

#include "diffmf/ss2d.h"

namespace diffmf {

struct CrossScanProblem {
  int64_t batch, channels, height, width;
  int paths;
  int path[kMaxPaths];  // 0 row-major, 1 column-major, 2 and 3 their reverses

  int64_t tokens() const { return height * width; }
};

namespace cpu {
// A copy of elements of 1, 2, 4 or 8 bytes; another size throws std::invalid_argument.
void cross_scan(const CrossScanProblem&, int64_t element_bytes, const void* image /* [B, C, H, W] */,
                void* out /* [B, K, C, H*W] */, int threads);
// The sum is taken in float (double for f64) and rounded once.
void cross_merge(const CrossScanProblem&, DType, const void* y /* [B, K, C, H*W] */, void* out /* [B, C, H, W] */,
                 int threads);
}  // namespace cpu

namespace cuda {
// On the current device and `stream` (a cudaStream_t), without synchronizing. Throw std::runtime_error with CUDA's
// message on failure.
void cross_scan(const CrossScanProblem&, int64_t element_bytes, const void* image, void* out, void* stream);
void cross_merge(const CrossScanProblem&, DType, const void* y, void* out, void* stream);
}  // namespace cuda

}  // namespace diffmf
