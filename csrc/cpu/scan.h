// Between the driver (ss2d.cpp: threads, memory, the order of sums) and the kernels (scan_kernels.h, compiled once per
// instruction set): one scan of one modality, batch item, path and block of channels, and the merging of its results.
#pragma once

#include <cstdint>

#include "diffmf/ss2d.h"

namespace diffmf::cpu {

// Channels scanned together: one AVX-512 vector of floats, two of AVX2. The same for every instruction set.
constexpr int kLanes = 16;

// In bytes. (static: see simd.h.)
static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    default:
      return 2;
  }
}

// The tokens of one tensor along a path's axis: the row of token q is at
// base + (q / line) * line_stride + (q % line) * token_stride, strides in elements of dtype.
struct Rows {
  DType dtype;
  void* base;
  int64_t line, line_stride, token_stride;
};

struct Scan {
  int64_t tokens, pieces;
  bool reverse;             // from the last token of the axis to the first
  int states, rank, lanes;  // lanes: the block's channels, at most kLanes
  bool zoh, shared_decay, softplus;
  Rows x, delta, dt, bc;  // [tokens][lanes], [tokens][lanes] (rank == 0), [tokens][rank], [tokens][2 states]
  const void* dt_weight;  // [lanes, rank]
  const void* dt_bias;    // [lanes] or null
  const void* a;          // [lanes, states or 1]
  const void* d;          // [lanes] or null
  void* saved;            // [pieces, states, channels] from this block's first channel; may be null
  int64_t channels;       // of all blocks: the stride of `saved`
};

// Rows of parameter gradients of one block.
static inline int parameter_rows(const SS2DProblem& problem) {
  return static_cast<int>((problem.shared_decay ? 1 : problem.states) + problem.rank + 2);
}

// Results of the backward scan of a few pieces. Token slots are counted from the first piece of the scan's segment,
// kCheckpoint to a piece, and within a piece along the axis.
template <class Real>
struct ScanGradients {
  Rows dy;             // [tokens][lanes]
  Real* carry;         // [states][kLanes] gradient of the state, handed from segment to segment
  Real* dx;            // [slots][kLanes]
  Real* ddelta;        // [slots][kLanes] or null (rank > 0)
  Real* dproj;         // [slots][rank + 2 states], this block's share of the sum over channels
  double* parameters;  // [parameter_rows][kLanes], added to: dA [states or 1], ddt_weight [rank], ddt_bias, dD
};

// The kernels of one instruction set. A segment is `count` pieces from `first` on, in the order of the scan.
template <class Real>
struct Kernels {
  // Elements of Real of per-thread scratch memory, aligned to 64 bytes, that a scan needs.
  int64_t (*forward_workspace)(int states, int rank);
  int64_t (*backward_workspace)(int states, int rank);
  // Advances state [states][kLanes] and writes y [slots][kLanes].
  void (*forward)(const Scan&, int64_t first, int64_t count, Real* state, Real* y, Real* workspace);
  // Goes through the segment against the order of the scan.
  void (*backward)(const Scan&, const ScanGradients<Real>&, int64_t first, int64_t count, Real* workspace);
  // rows[q][0 .. width) += slots[q - first][stride ..] for the tokens [first, last) of the axis; rows of Real.
  void (*add)(const Rows& rows, int64_t first, int64_t last, const Real* slots, int64_t stride, int64_t width);
  // rows[q][0 .. width) = the sum of the slots of `count` blocks (zero when there are none), in their order.
  void (*store_sum)(const Rows& rows, int64_t first, int64_t last, const Real* const* slots, int count, int64_t stride,
                    int64_t width);
};

// The i-th piece of a scan: its index and its tokens [first, last) along the axis. (static: see simd.h.)
struct Piece {
  int64_t index, first, last;
};
static inline Piece scan_piece(int64_t tokens, int64_t pieces, bool reverse, int64_t i) {
  const int64_t index = reverse ? pieces - 1 - i : i;
  const int64_t first = index * kCheckpoint;
  return {index, first, tokens - first < kCheckpoint ? tokens : first + kCheckpoint};
}

namespace baseline {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace avx512
#endif

}  // namespace diffmf::cpu
