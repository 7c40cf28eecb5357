// ss2d: CrossScan, (cross-modal) selective scan and CrossMerge as one operation on channels-last images.
//
// For modality m, batch b, channel d and path k, along scan position l = 0 .. L-1 with p = pixel_k(l) and h = 0 at
// the start (L = height * width):
//
//     raw  = dt_bias[m,k,d] + delta[m,b,p,k,d]    when the step is given per channel (rank == 0), otherwise
//            dt_bias[m,k,d] + sum_r proj[m,b,p,k,r] * dt_weight[m,k,d,r]
//     step = softplus(raw), or raw when !softplus
//     B_n  = proj[s(m),b,p,k,rank+n]              C_n = proj[s(m),b,p,k,rank+states+n]
//     h_n  = exp(step * A[m,k,d,n]) * h_n + bbar(step, A_n) * B_n * x[m,b,p,(k,)d]
//     y[m,b,p,d] += sum_n C_n * h_n + D[m,k,d] * x[m,b,p,(k,)d]
//
// with bbar = step (Discretization::euler) or (exp(step * A_n) - 1) / A_n (Discretization::zoh), and s(m) the
// modality whose B and C modality m reads (Exchange). Every pointer is a plain device or host pointer; the caller
// allocates everything. Arithmetic and state are float (double when dtype == f64, host only).
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffmf {

constexpr int kMaxPaths = 8;

// Tokens between two states that the forward pass saves. Token q counts along a path's axis (rows: q = row * width +
// column, columns: q = column * height + row) whatever the sense of the path, so with 64 tokens piece i is tokens
// [64 i, 64 i + 64) of the axis and its saved state is the one with which the path enters the piece: from below for
// paths 0 and 1, from above (the highest q of the piece is scanned first) for the reversed paths 2 and 3.
namespace cpu {
constexpr int64_t kCheckpoint = 64;
}
namespace cuda {
// A single state is saved for every tile of the backward kernel, which then need not scan a piece to find them.
constexpr int64_t checkpoint_of(int64_t states) { return states == 1 ? 8 : 64; }
}  // namespace cuda

enum class DType : int { f32, bf16, f16, f64 };                           // of x, proj, delta, y
enum class Exchange : int { none, mutual, from_visible, from_infrared };  // modality 0 infrared, 1 visible
enum class Discretization : int { euler, zoh };

// s(m): the modality whose B and C modality m reads.
constexpr int source_of(Exchange exchange, int m) {
  switch (exchange) {
    case Exchange::mutual:
      return 1 - m;
    case Exchange::from_visible:
      return 1;
    case Exchange::from_infrared:
      return 0;
    default:
      return m;
  }
}

struct SS2DProblem {
  DType dtype;
  int64_t modalities, batch, height, width, channels, states, rank;
  int paths;
  int path[kMaxPaths];  // 0 row-major, 1 column-major, 2 and 3 their reverses
  Exchange exchange;
  Discretization discretization;
  bool shared_decay;  // A is [M, K, D, 1], one decay per channel, instead of [M, K, D, N]
  bool softplus;

  int64_t tokens() const { return height * width; }
  int64_t pieces(int64_t checkpoint) const { return (tokens() + checkpoint - 1) / checkpoint; }
  int64_t decays() const { return shared_decay ? 1 : states; }
  int64_t source(int64_t m) const { return source_of(exchange, static_cast<int>(m)); }
};

// Strides in elements; the innermost (channel) stride is 1. On a GPU the pixels of an image are equally spaced: row =
// width * column. `path` is 0 where all paths share the same tokens.
struct Strides {
  int64_t modality, batch, row, column, path;
};

struct SS2DInputs {
  const void* x;  // [M, B, H, W, (K,) D], dtype
  Strides x_strides;
  const void* proj;  // [M, B, H, W, K, R + 2N], dtype
  Strides proj_strides;
  const void* delta;  // [M, B, H, W, K, D], dtype; null unless rank == 0
  Strides delta_strides;
  const void* dt_weight;  // [M, K, D, R], float (double for f64), as the three below; null when rank == 0
  const void* dt_bias;    // [M, K, D]; may be null
  const void* a;          // [M, K, D, N] or [M, K, D, 1]
  const void* d;          // [M, K, D]; may be null
};

struct SS2DOutputs {
  void* y;           // [M, B, H, W, D] contiguous, dtype
  void* states;      // [M, B, K, pieces, N, D], float: the state entering every piece; null: not wanted
  void* last_state;  // [M, B, K, N, D], float: the state after the last token; null: not wanted
};

// Gradients, contiguous, in the layout of the inputs (with a K axis on dx iff x_per_path).
struct SS2DGradients {
  const void* dy;      // [M, B, H, W, D] contiguous, dtype
  const void* states;  // as saved by the forward pass
  bool x_per_path;     // x has a K axis, and so has dx
  void* dx;            // [M, B, H, W, (K,) D], dtype
  void* dproj;         // [M, B, H, W, K, R + 2N], dtype
  void* ddelta;        // [M, B, H, W, K, D], dtype; null unless rank == 0
  void* ddt_weight;    // [M, K, D, R], float; null when rank == 0
  void* ddt_bias;      // [M, K, D], float; null when dt_bias is null
  void* da;            // [M, K, D, N or 1], float
  void* dd;            // [M, K, D], float; null when d is null
};

namespace cpu {
// Both run on `threads` threads and give the same bits for any number of them.
void ss2d_forward(const SS2DProblem&, const SS2DInputs&, const SS2DOutputs&, int threads);
void ss2d_backward(const SS2DProblem&, const SS2DInputs&, const SS2DGradients&, int threads);
}  // namespace cpu

namespace cuda {
// One cooperative kernel each, on the current device and `stream` (a cudaStream_t), without synchronizing.
// `workspace` holds at least *_workspace bytes. Throws std::runtime_error with CUDA's message on failure.
size_t ss2d_forward_workspace(const SS2DProblem&);
void ss2d_forward(const SS2DProblem&, const SS2DInputs&, const SS2DOutputs&, void* workspace, void* stream);
size_t ss2d_backward_workspace(const SS2DProblem&);
void ss2d_backward(const SS2DProblem&, const SS2DInputs&, const SS2DGradients&, void* workspace, void* stream);
}  // namespace cuda

}  // namespace diffmf
