// What the forward and the backward kernel of ss2d share: how a block is laid over channels and states, how tokens
// are addressed along a path, how a tile of tokens is staged in shared memory, and the scan over chunk summaries.
//
// A block owns `block_channels` channels; `state_lanes` neighbouring threads share a channel and each keeps NS of its
// states in registers. Thread tid is (channel tid / state_lanes, lane tid % state_lanes) in the recurrences, and
// (token slot tid / block_channels, channel tid % block_channels) where it moves data, so that global accesses are
// coalesced: tokens are channels-last, so all four paths read rows of contiguous channels.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "diffmf/ss2d.h"

namespace diffmf {
namespace cuda {

constexpr int kTile = 8;     // tokens staged at a time; divides kCheckpoint, so tiles never straddle a piece
constexpr int kRowRegs = 8;  // elements of the next tile's proj rows that a thread holds in registers
constexpr float kLog2e = 1.4426950408889634f;
static_assert(kCheckpoint % kTile == 0, "tiles must not straddle pieces");

// q / d for 0 <= q < 2^31 by one multiplication.
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ uint32_t quotient(uint32_t q) const { return (__umulhi(q, multiplier) + q) >> shift; }
};

template <typename T>
struct Params {
  int modalities, batch, paths, channels, states, rank, tokens, width;
  FastDiv by_width, by_height;
  int path[kMaxPaths];
  int order[kMaxPaths];  // the paths sorted by axis: row paths first
  int row_paths;         // how many of them run along rows
  Exchange exchange;
  bool softplus;
  bool is_bf16;  // what the 16-bit T holds

  int block_channels, state_lanes, groups;  // groups = blocks of channels
  int padded_states, pitch;                 // NS * state_lanes; floats of a staged row
  int row_shift;                            // 2^row_shift threads load one proj row together
  int chunk, chunks;                        // tokens of a chunk (a multiple of kCheckpoint), chunks of the axis

  const T* x;
  const T* proj;
  const T* delta;
  Strides x_strides, proj_strides, delta_strides;
  const float* dt_weight;  // [M, K, D, R]
  const float* dt_bias;    // [M, K, D] or null
  const float* a;          // [M, K, D, N or 1]
  const float* d;          // [M, K, D] or null

  float* chunk_state;  // [M, B, K, chunks, N, D]
  float* chunk_steps;  // [M, B, K, chunks, D], the sum of the steps of a chunk

  __device__ int source(int m) const {
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
  __device__ int pieces() const { return (tokens + int{kCheckpoint} - 1) / int{kCheckpoint}; }
  __device__ int row() const { return rank + 2 * states; }
};

// A 16-bit activation. bf16 or f16 is decided where one is read or written, which is rare beside the arithmetic: half
// the kernels to compile.
struct Half16 {
  uint16_t bits;
};
__device__ inline float decode(float v, bool) { return v; }
__device__ inline float decode(Half16 v, bool is_bf16) {
  return is_bf16 ? __uint_as_float(uint32_t{v.bits} << 16) : __half2float(__ushort_as_half(v.bits));
}
__device__ inline void encode(float v, bool, float* to) { *to = v; }
__device__ inline void encode(float v, bool is_bf16, Half16* to) {
  to->bits = is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}

// The special-function unit's 2^v: relative error 2^-22, and decays that would be denormal become zero.
__device__ inline float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

struct Step {
  float value, slope;  // softplus(raw) and its derivative
};

// log(1 + e^raw) = max(raw, 0) + log1p(e), e = e^-|raw|, with log1p(e) = 2 atanh(e / (2 + e)) as a series: e / (2 + e)
// is at most 1/3, and the result keeps its relative accuracy for very negative raw, where the usual lg2(1 + e) has
// none.
__device__ inline Step softplus_step(float raw) {
  const float e = exp2_fast(-fabsf(raw) * kLog2e);
  const float s = __fdividef(e, 2.f + e), s2 = s * s;
  float series = 1.f / 13.f;
  series = fmaf(series, s2, 1.f / 11.f);
  series = fmaf(series, s2, 1.f / 9.f);
  series = fmaf(series, s2, 1.f / 7.f);
  series = fmaf(series, s2, 1.f / 5.f);
  series = fmaf(series, s2, 1.f / 3.f);
  series = fmaf(series, s2, 1.f);
  const float inverse = __fdividef(1.f, 1.f + e);
  return {fmaxf(raw, 0.f) + 2.f * s * series, raw >= 0.f ? inverse : e * inverse};
}

// Zero-order hold: bbar = (e^z - 1) / A with z = step * A, by its Taylor series where the difference would cancel.
__device__ inline float zoh_weight(float step, float z, float decay, float a) {
  float p = 1.f / 40320.f;
  p = fmaf(p, z, 1.f / 5040.f);
  p = fmaf(p, z, 1.f / 720.f);
  p = fmaf(p, z, 1.f / 120.f);
  p = fmaf(p, z, 1.f / 24.f);
  p = fmaf(p, z, 1.f / 6.f);
  p = fmaf(p, z, 0.5f);
  p = fmaf(p, z, 1.f);
  return fabsf(z) < 0.5f ? step * p : __fdividef(decay - 1.f, a);
}

// d bbar / dA = (step * e^z - bbar) / A, likewise.
__device__ inline float zoh_weight_slope(float step, float z, float decay, float bbar, float a) {
  float p = 1.f / 45360.f;
  p = fmaf(p, z, 1.f / 5760.f);
  p = fmaf(p, z, 1.f / 840.f);
  p = fmaf(p, z, 1.f / 144.f);
  p = fmaf(p, z, 1.f / 30.f);
  p = fmaf(p, z, 1.f / 8.f);
  p = fmaf(p, z, 1.f / 3.f);
  p = fmaf(p, z, 0.5f);
  return fabsf(z) < 0.5f ? step * step * p : __fdividef(step * decay - bbar, a);
}

struct Pixel {
  int row, column;
};

// Token q of an axis (0 rows, 1 columns).
template <typename T>
__device__ inline Pixel pixel_of(const Params<T>& p, int axis, int q) {
  const FastDiv& by = axis == 0 ? p.by_width : p.by_height;
  const int major = static_cast<int>(by.quotient(static_cast<uint32_t>(q)));
  const int minor = q - major * static_cast<int>(by.divisor);
  return axis == 0 ? Pixel{major, minor} : Pixel{minor, major};
}
__device__ inline int64_t offset_of(const Strides& s, Pixel at) { return at.row * s.row + at.column * s.column; }

// One path of one (modality, batch item) seen by one block of channels.
template <typename T>
struct Track {
  int m, b, k, axis, group;
  bool reversed;
  const T* x;      // at pixel (0, 0), first channel of the block
  const T* low;    // proj row whose first `rank` values are this modality's
  const T* bc;     // proj row of the source modality
  const T* delta;  // or null

  __device__ Track(const Params<T>& p, int m, int b, int k, int group)
      : m(m), b(b), k(k), axis(p.path[k] & 1), group(group), reversed(p.path[k] >= 2) {
    const int64_t first = int64_t{group} * p.block_channels;
    x = p.x + m * p.x_strides.modality + b * p.x_strides.batch + k * p.x_strides.path + first;
    low = p.proj + m * p.proj_strides.modality + b * p.proj_strides.batch + k * p.proj_strides.path;
    bc = p.proj + p.source(m) * p.proj_strides.modality + b * p.proj_strides.batch + k * p.proj_strides.path;
    delta = p.delta == nullptr
                ? nullptr
                : p.delta + m * p.delta_strides.modality + b * p.delta_strides.batch + k * p.delta_strides.path + first;
  }
  __device__ int64_t mk(const Params<T>& p) const { return int64_t{m} * p.paths + k; }
  __device__ int64_t mbk(const Params<T>& p) const { return (int64_t{m} * p.batch + b) * p.paths + k; }
};

// Which of a proj row's values a walk needs: the low-rank part always, then B, C or both.
struct Columns {
  int skipped_from, skipped, count;  // `count` values, leaving out [skipped_from, skipped_from + skipped)
};
template <typename T>
__device__ inline Columns columns_bc(const Params<T>& p) {
  return {0, 0, p.rank + 2 * p.states};
}
template <typename T>
__device__ inline Columns columns_b(const Params<T>& p) {
  return {0, 0, p.rank + p.states};
}
template <typename T>
__device__ inline Columns columns_c(const Params<T>& p) {
  return {p.rank, p.states, p.rank + p.states};
}

// Where a tile's tokens lie: element offsets into one (modality, batch item) of x, proj and y, computed once per tile
// by kTile threads because every other thread needs them. valid is false past the end of the chunk.
struct TokenPlace {
  int64_t x, proj, pixel;
  bool valid;
};
template <typename T>
__device__ inline void place_tile(const Params<T>& p, const Track<T>& track, int q0, int end, TokenPlace* places) {
  if (threadIdx.x >= kTile) return;
  const int q = q0 + static_cast<int>(threadIdx.x);
  const Pixel at = pixel_of(p, track.axis, q);
  places[threadIdx.x] = {offset_of(p.x_strides, at), offset_of(p.proj_strides, at),
                         int64_t{at.row} * p.width + at.column, q < end};
}

// Keeps the compiler from computing what depends on v once and holding it in registers across a whole loop: the
// recurrence needs those registers more than it minds a few integer instructions per tile.
__device__ inline int recomputed(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Calls f(e, t, j) for the elements first <= e < last of this thread's share of a tile's rows: token t, value j.
template <typename T, typename F>
__device__ inline void for_row_share(const Params<T>& p, const Columns& columns, F&& f) {
  const int thread = recomputed(threadIdx.x);
  const int lanes = 1 << p.row_shift, stride = blockDim.x >> p.row_shift, lane = thread & (lanes - 1);
  int t = thread >> p.row_shift, j = lane;
#pragma unroll
  for (int e = 0; e < kRowRegs; ++e) {
    if (t >= kTile) break;
    if (j < columns.count) f(e, t, j >= columns.skipped_from ? j + columns.skipped : j);
    j += lanes;
    if (j >= columns.count) {
      j = lane;
      t += stride;
    }
  }
  // Rows too long for the registers (large N or R): the rest, not prefetched.
  while (t < kTile) {
    if (j < columns.count) f(-1, t, j >= columns.skipped_from ? j + columns.skipped : j);
    j += lanes;
    if (j >= columns.count) {
      j = lane;
      t += stride;
    }
  }
}

// A staged row is [B (padded) | C (padded) | low rank], so that B and C start on 16 bytes.
template <typename T>
__device__ inline int staged_index(const Params<T>& p, int j) {
  if (j < p.rank) return 2 * p.padded_states + j;
  const int n = j - p.rank;
  return n < p.states ? n : p.padded_states + n - p.states;
}

// Registers of the tile that is being fetched while the one before is computed.
struct RowRegs {
  float v[kRowRegs];
};

template <typename T>
__device__ inline float load_row_value(const Params<T>& p, const Track<T>& track, const TokenPlace& place, int j) {
  if (!place.valid) return 0.f;
  return decode((j < p.rank ? track.low : track.bc)[place.proj + j], p.is_bf16);
}
template <typename T>
__device__ inline void fetch_rows(const Params<T>& p, const Track<T>& track, const Columns& columns,
                                  const TokenPlace* places, RowRegs& regs) {
  for_row_share(p, columns, [&](int e, int t, int j) {
    if (e >= 0) regs.v[e] = load_row_value(p, track, places[t], j);
  });
}
template <typename T>
__device__ inline void store_rows(const Params<T>& p, const Track<T>& track, const Columns& columns,
                                  const TokenPlace* places, const RowRegs& regs, float* rows) {
  for_row_share(p, columns, [&](int e, int t, int j) {
    rows[t * p.pitch + staged_index(p, j)] = e >= 0 ? regs.v[e] : load_row_value(p, track, places[t], j);
  });
}

// NS consecutive staged values, 16 bytes at a time where NS allows.
template <int NS>
__device__ inline void read_states(const float* from, float (&v)[NS]) {
  if constexpr (NS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < NS; i += 4) {
      const float4 quad = *reinterpret_cast<const float4*>(from + i);
      v[i] = quad.x;
      v[i + 1] = quad.y;
      v[i + 2] = quad.z;
      v[i + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NS; ++i) v[i] = from[i];
  }
}

// The A of this thread's states (zero for padding), natural units.
template <int NS, bool kSharedDecay, typename T>
__device__ inline void load_decays(const Params<T>& p, const Track<T>& track, int c, int lane,
                                   float (&a)[kSharedDecay ? 1 : NS]) {
  const int d = track.group * p.block_channels + c;
  const int64_t mkd = track.mk(p) * p.channels + d;
  if constexpr (kSharedDecay) {
    a[0] = d < p.channels ? p.a[mkd] : 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < NS; ++i) {
      const int n = lane * NS + i;
      a[i] = d < p.channels && n < p.states ? p.a[mkd * p.states + n] : 0.f;
    }
  }
}

// This thread's states from and to memory laid out [N, D]; `at` is state 0 of the thread's channel.
template <int NS, typename T>
__device__ inline void load_state(const Params<T>& p, const float* at, int lane, float (&h)[NS]) {
#pragma unroll
  for (int i = 0; i < NS; ++i) {
    const int n = lane * NS + i;
    if (n < p.states) h[i] = at[int64_t{n} * p.channels];
  }
}
template <int NS, typename T>
__device__ inline void store_state(const Params<T>& p, float* at, int lane, const float (&h)[NS]) {
#pragma unroll
  for (int i = 0; i < NS; ++i) {
    const int n = lane * NS + i;
    if (n < p.states) at[int64_t{n} * p.channels] = h[i];
  }
}

// Zeros where staged rows are padded: B and C of states that do not exist.
template <typename T>
__device__ inline void clear_padding(const Params<T>& p, float* rows, int count) {
  for (int i = threadIdx.x; i < count * p.pitch; i += blockDim.x) rows[i] = 0.f;
  __syncthreads();
}

// The track of path k for task index (modality, batch item, channel block), the last fastest.
template <typename T>
__device__ inline Track<T> track_of(const Params<T>& p, int64_t index, int k) {
  const int group = static_cast<int>(index % p.groups);
  const int64_t image = index / p.groups;
  return Track<T>(p, static_cast<int>(image / p.batch), static_cast<int>(image % p.batch), k, group);
}

// dt_weight of the block's channels into shared memory, [R, block_channels].
template <typename T>
__device__ inline void stage_weight(const Params<T>& p, const Track<T>& track, float* weight) {
  for (int i = threadIdx.x; i < p.rank * p.block_channels; i += blockDim.x) {
    const int c = i / p.rank, r = i % p.rank, d = track.group * p.block_channels + c;
    weight[r * p.block_channels + c] = d < p.channels ? p.dt_weight[(track.mk(p) * p.channels + d) * p.rank + r] : 0.f;
  }
}

// Step of one token and channel from its staged row, or from `delta` (the value read from memory) when rank is 0.
template <typename T>
__device__ inline Step token_step(const Params<T>& p, const float* row, const float* weight, int c, float bias,
                                  float delta) {
  float raw = bias + delta;
  const float* low = row + 2 * p.padded_states;
  for (int r = 0; r < p.rank; ++r) raw = fmaf(low[r], weight[r * p.block_channels + c], raw);
  return p.softplus ? softplus_step(raw) : Step{raw, 1.f};
}

// Turns the summaries of the chunks (end state from a zero start; the decay of a chunk is exp(A * its sum of steps))
// into the state that enters each chunk, in place. One thread per (modality, batch, path, state, channel), along the
// scan, or against it for the gradients (`backwards`). Loads are batched: they do not depend on the running state.
template <typename T>
__device__ inline void prefix_chunks(const Params<T>& p, bool shared_decay, bool backwards) {
  constexpr int kBatch = 8;
  const int64_t plane = int64_t{p.states} * p.channels;
  const int64_t sequences = int64_t{p.modalities} * p.batch * p.paths * plane;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < sequences;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t mbk = i / plane;
    const int n = static_cast<int>(i % plane / p.channels), d = static_cast<int>(i % p.channels);
    const int k = static_cast<int>(mbk % p.paths);
    const int64_t mkd = (mbk / p.paths / p.batch * p.paths + k) * p.channels + d;
    const float a = (shared_decay ? p.a[mkd] : p.a[mkd * p.states + n]) * kLog2e;
    const bool descending = (p.path[k] >= 2) != backwards;
    float* state = p.chunk_state + mbk * p.chunks * plane + i % plane;
    const float* steps = p.chunk_steps + mbk * p.chunks * p.channels + d;
    float running = 0.f;
    for (int first = 0; first < p.chunks; first += kBatch) {
      float summary[kBatch], step[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j < p.chunks) {
          const int64_t at = descending ? p.chunks - 1 - first - j : first + j;
          summary[j] = state[at * plane];
          step[j] = steps[at * p.channels];
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j < p.chunks) {
          const int64_t at = descending ? p.chunks - 1 - first - j : first + j;
          state[at * plane] = running;
          running = fmaf(exp2_fast(a * step[j]), running, summary[j]);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace diffmf
