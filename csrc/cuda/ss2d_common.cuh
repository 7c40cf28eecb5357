// What the forward and the backward kernel of ss2d share: addressing tokens along a path, asynchronous copies into
// shared memory, the step, the state in memory, and the scan over chunk summaries.
//
// Layout of the work. `state_lanes` neighbouring threads share CH neighbouring channels; each of them keeps NS of the
// channels' states in registers. So B and C of a token are read once for CH channels, and x, step and dy once for NS
// states. Tokens are channels-last: all four paths read and write rows of contiguous channels.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "diffmf/ss2d.h"

namespace diffmf {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// q / d for 0 <= q < 2^31 by one multiplication.
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ int quotient(int q) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(q), multiplier) + static_cast<uint32_t>(q)) >> shift);
  }
};

// An activation tensor: strides in bytes; the pixels of an image are equally spaced, `pixel` bytes apart.
struct Activation {
  const char* data;
  int64_t modality, batch, path;
  int pixel;
  int granule;  // bytes that can be copied at a time: 16, 8, 4 or 2
};

struct Params {
  int modalities, batch, paths, channels, states, rank, tokens, width;
  int checkpoint_shift;  // log2(checkpoint_of(states))
  FastDiv by_height;
  int path[kMaxPaths];
  Exchange exchange;
  DType dtype;
  bool half;  // dtype is one of the 16-bit types
  bool softplus, zoh;
  bool shared_decay;  // one for all states of a channel
  bool pairs;         // B and C of one state in 16 bits are copied together: each by itself is less than can be

  int state_lanes, block_channels, groups;  // groups = blocks of channels
  int lane_shift;                           // log2(state_lanes)
  int padded_states, pitch;                 // NS * state_lanes; values of a staged row [B | C | low rank]
  // The axis is cut into chunks of whole granules: `shortest` each, and one more for `longer` of them, evenly spread.
  int chunks, granule, shortest, longer;
  FastDiv by_chunks;

  Activation x, proj, delta;
  const float* dt_weight;  // [M, K, D, R]
  const float* dt_bias;    // [M, K, D] or null
  const float* a;          // [M, K, D, N or 1]
  const float* d;          // [M, K, D] or null

  float* chunk_state;  // [M, B, K, chunks, N, D]
  float* chunk_steps;  // [M, B, K, chunks, D], the sum of the steps of a chunk

  __device__ int source(int m) const { return source_of(exchange, m); }
  __device__ int pieces() const { return ((tokens - 1) >> checkpoint_shift) + 1; }
  __device__ int row() const { return rank + 2 * states; }
  // First token of a chunk; of the one after the last, the end.
  __device__ int begin_of(int chunk) const {
    return min((chunk * shortest + by_chunks.quotient(chunk * longer)) * granule, tokens);
  }
  __host__ __device__ int element() const { return half ? 2 : 4; }
};

// A 16-bit activation as float.
__device__ inline float decode(uint16_t bits, DType dtype) {
  return dtype == DType::bf16 ? __uint_as_float(uint32_t{bits} << 16) : __half2float(__ushort_as_half(bits));
}
__device__ inline uint16_t encode(float v, DType dtype) {
  return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}
// Two neighbouring ones, the first in the low bits. Both types' conversions are computed and one selected.
__device__ inline float2 decode_two(uint32_t bits, DType dtype) {
  const float2 half = __half22float2(*reinterpret_cast<const __half2*>(&bits));
  return dtype == DType::bf16 ? make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)) : half;
}
__device__ inline uint32_t encode_two(float2 v, DType dtype) {
  const __nv_bfloat162 bf16 = __floats2bfloat162_rn(v.x, v.y);
  const __half2 half = __floats2half2_rn(v.x, v.y);
  return dtype == DType::bf16 ? *reinterpret_cast<const uint32_t*>(&bf16) : *reinterpret_cast<const uint32_t*>(&half);
}
// Element i of an output of type dtype.
__device__ inline void store_as(void* to, int64_t i, float v, const Params& p) {
  if (p.half) {
    static_cast<uint16_t*>(to)[i] = encode(v, p.dtype);
  } else {
    static_cast<float*>(to)[i] = v;
  }
}

// The special-function unit's 2^v: relative error 2^-22, and decays that would be denormal become zero.
__device__ inline float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// c0 + c1 v + c2 v^2 + ..., by Horner's rule.
__device__ inline float polynomial(float, float c0) { return c0; }
template <typename... Floats>
__device__ inline float polynomial(float v, float c0, Floats... higher) {
  return fmaf(polynomial(v, higher...), v, c0);
}

// log(1 + e^raw) = max(raw, 0) + log1p(e), e = e^-|raw|, with log1p(e) = e * P(e), P of degree 8 fitted on [0, 1] to
// 3e-8. So the result keeps its relative accuracy for very negative raw, where the usual lg2(1 + e) has none.
__device__ inline float softplus(float raw, float e) {
  return polynomial(e, fmaxf(raw, 0.f), 1.f, -0.49999493f, 0.33319095f, -0.24842978f, 0.19105989f, -0.13663207f,
                    0.0782255f, -0.02950496f, 0.0052326247f);
}
__device__ inline float softplus(float raw) { return softplus(raw, exp2_fast(-fabsf(raw) * kLog2e)); }

__device__ inline float reciprocal(float v) {  // relative error 2^-23
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Zero-order hold, bbar = (e^z - 1) / A with z = step * A. Decays are kept as a = A / ln 2, so z = sigma * a with sigma
// = step * ln 2; `v` is step * a, `decay` 2^v = e^z, and `inverse` 1 / a. Both forms are computed and one selected:
// lanes that branch apart take longer. This is ln 2 * bbar; where the difference would cancel, by a polynomial for (e^z
// - 1) / z fitted on |z| < 1/2 to 1.5e-7.
constexpr float kZohNear = 0.5f * kLog2e;
__device__ inline float zoh_weight(float sigma, float v, float decay, float inverse) {
  const float near = polynomial(v, 1.f, 0.34657359f, 8.0072135e-2f, 1.3875736e-2f, 1.9408683e-3f, 2.2371874e-4f);
  return fabsf(v) < kZohNear ? sigma * near : fmaf(decay, inverse, -inverse);
}
// (ln 2)^2 * d bbar / dA = (sigma * e^z - ln 2 * bbar) / a, likewise, to 2.8e-7. With it, ln 2 * bbar = sigma * e^z - a
// times this, and nothing cancels there.
__device__ inline float zoh_slope(float sigma, float v, float decay, float inverse) {
  const float near = polynomial(v, 0.5f, 0.23104906f, 6.005368e-2f, 1.1100562e-2f, 1.6181103e-3f, 1.9180641e-4f);
  return fabsf(v) < kZohNear ? sigma * sigma * near : fmaf(sigma, decay, -fmaf(decay, inverse, -inverse)) * inverse;
}
// 1 / a of a thread's decays, for zero-order hold.
template <int kDecays, int CH>
__device__ inline void invert_decays(const float (&a)[CH][kDecays], float (&inverse)[CH][kDecays]) {
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int n = 0; n < kDecays; ++n) inverse[c][n] = reciprocal(a[c][n]);
}

// One path of one (modality, batch item) seen by one block of channels.
struct Track {
  int m, b, k, first_d;
  bool by_columns, reversed;

  // `image` counts (modality, batch item).
  __device__ Track(const Params& p, int image, int k, int group)
      : m(image / p.batch),
        b(image % p.batch),
        k(k),
        first_d(group * p.block_channels),
        by_columns(p.path[k] & 1),
        reversed(p.path[k] >= 2) {}
  __device__ int64_t mk(const Params& p) const { return int64_t{m} * p.paths + k; }
  __device__ int64_t mbk(const Params& p) const { return (int64_t{m} * p.batch + b) * p.paths + k; }
  // Pixel of token q of the axis.
  __device__ int pixel(const Params& p, int q) const {
    if (!by_columns) return q;
    const int column = p.by_height.quotient(q);
    return (q - column * static_cast<int>(p.by_height.divisor)) * p.width + column;
  }
};

// Where a track's tensors are at pixel 0. Kept in shared memory: in registers they would be spilled to local memory,
// which is farther away.
struct Bases {
  const char* x;      // first channel of the block
  const char* low;    // proj row whose first `rank` values are this modality's
  const char* bc;     // values of B in the proj row of the source modality
  const char* delta;  // first channel of the block; or null

  __device__ Bases(const Params& p, const Track& t) {
    const int64_t first = int64_t{t.first_d} * p.element();
    x = p.x.data + t.m * p.x.modality + t.b * p.x.batch + t.k * p.x.path + first;
    const char* proj = p.proj.data + t.b * p.proj.batch + t.k * p.proj.path;
    low = proj + t.m * p.proj.modality;
    bc = proj + p.source(t.m) * p.proj.modality + p.rank * p.element();
    delta = p.delta.data == nullptr
                ? nullptr
                : p.delta.data + t.m * p.delta.modality + t.b * p.delta.batch + t.k * p.delta.path + first;
  }
};

// The same number, opaque to the compiler: addresses made of it are not hoisted out of a loop into registers.
__device__ inline int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Zeros in `bytes` of shared memory, a multiple of 16; one of `threads` threads' share.
__device__ inline void clear_shared(char* from, int bytes, int thread, int threads) {
#pragma unroll 1
  for (int i = thread * 16; i < bytes; i += threads * 16)
    *reinterpret_cast<float4*>(from + i) = make_float4(0.f, 0.f, 0.f, 0.f);
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
template <int kBytes>
__device__ inline void copy_async(uint32_t to, const char* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}
// The same, or zeros.
template <int kBytes>
__device__ inline void copy_async_or_zeros(uint32_t to, const char* from, bool zeros) {
  asm volatile(
      "{\n\t.reg .pred zeros;\n\tsetp.ne.u32 zeros, %3, 0;\n\t"
      "cp.async.ca.shared.global [%0], [%1], %2, zeros;\n\t}" ::"r"(to),
      "l"(from), "n"(kBytes), "r"(static_cast<uint32_t>(zeros))
      : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Adds to memory without reading it back. Which additions meet is ordered by barriers, so the sum is deterministic.
// Memory is not clobbered: between barriers nobody reads what is added to, and loads may pass.
template <int CH>
__device__ inline void add_at(float* to, const float (&v)[CH]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (CH == 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3]));
  } else if constexpr (CH == 2) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v[0]), "f"(v[1]));
  } else
#endif
  {
#pragma unroll
    for (int c = 0; c < CH; ++c) asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to + c), "f"(v[c]));
  }
}

// Four staged 16-bit values as float.
__device__ inline float4 decode_quad(const void* from, DType dtype) {
  const uint2 raw = *static_cast<const uint2*>(from);
  const float2 low = decode_two(raw.x, dtype), high = decode_two(raw.y, dtype);
  return make_float4(low.x, low.y, high.x, high.y);
}

// B and C of one state staged in 16 bits, as the padded row [B, 0, 0, 0 | C, 0, 0, 0].
__device__ inline void decode_pair(const void* from, float* to, DType dtype) {
  const float2 pair = decode_two(*static_cast<const uint32_t*>(from), dtype);
  reinterpret_cast<float4*>(to)[0] = make_float4(pair.x, 0.f, 0.f, 0.f);
  reinterpret_cast<float4*>(to)[1] = make_float4(pair.y, 0.f, 0.f, 0.f);
}

// CH neighbouring values of a staged row of activations, as float. `at` counts elements, a multiple of CH.
template <int CH, bool kHalf>
__device__ inline void read_activation(const Params& p, const char* row, int at, float (&v)[CH]) {
  static_assert(CH <= 2, "one load");
  if constexpr (!kHalf) {
    const float* from = reinterpret_cast<const float*>(row) + at;
    if constexpr (CH == 2) {
      const float2 pair = *reinterpret_cast<const float2*>(from);
      v[0] = pair.x;
      v[1] = pair.y;
    } else {
      v[0] = from[0];
    }
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + at;
    if constexpr (CH == 2) {
      const float2 pair = decode_two(*reinterpret_cast<const uint32_t*>(from), p.dtype);
      v[0] = pair.x;
      v[1] = pair.y;
    } else {
      v[0] = decode(from[0], p.dtype);
    }
  }
}

template <int CH>
__device__ inline void read_floats(const float* from, float (&v)[CH]) {
  if constexpr (CH % 4 == 0) {
#pragma unroll
    for (int i = 0; i < CH; i += 4) {
      const float4 quad = *reinterpret_cast<const float4*>(from + i);
      v[i] = quad.x;
      v[i + 1] = quad.y;
      v[i + 2] = quad.z;
      v[i + 3] = quad.w;
    }
  } else if constexpr (CH == 2) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    v[0] = pair.x;
    v[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < CH; ++i) v[i] = from[i];
  }
}
template <int CH>
__device__ inline void write_floats(float* to, const float (&v)[CH]) {
  if constexpr (CH == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (CH == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
  } else {
#pragma unroll
    for (int i = 0; i < CH; ++i) to[i] = v[i];
  }
}

// What the steps and the skip of the block's channels need, in shared memory: rows of block_channels values.
constexpr int kBiasRow = 0, kSkipRow = 1, kWeightRows = 2;  // dt_bias, D, and dt_weight for r = 0 .. R - 1
constexpr int kMinRank = 8;                                 // ranks below are staged as this one: with zeros
// Of a staged row [B | C | low rank]: the states of B and of C, and the values in all.
constexpr int padded_of(int states) { return (states + 3) / 4 * 4; }
constexpr int pitch_of(int padded_states, int rank) {
  return (2 * padded_states + (rank > kMinRank ? rank : kMinRank) + 7) / 8 * 8;
}
// `rows` of them, zeros for what does not exist; one of `threads` threads' share. What exists is copied asynchronously.
__device__ inline void stage_channels(const Params& p, const Track& track, float* to, int thread, int threads,
                                      int rows) {
#pragma unroll 1
  for (int i = thread; i < rows * p.block_channels; i += threads) {
    const int row = i / p.block_channels, r = row - kWeightRows, d = track.first_d + i - row * p.block_channels;
    const float* const from = row == kBiasRow ? p.dt_bias : row == kSkipRow ? p.d : p.dt_weight;
    const int64_t mkd = track.mk(p) * p.channels + d;
    if (d < p.channels && r < p.rank && from != nullptr) {
      copy_async<4>(shared_address(to + i), reinterpret_cast<const char*>(from + (r < 0 ? mkd : mkd * p.rank + r)));
    } else {
      to[i] = 0.f;
    }
  }
  copies_commit();
}
// The A of this thread's states in units of log2(e) (zero for what does not exist): decay = exp2(step * a).
// `d` is the thread's first channel, `lane` its place among the lanes of the channel. kSharedDecay: one is loaded for
// all states.
template <int NS, int CH, bool kSharedDecay>
__device__ inline void load_decays(const Params& p, const Track& track, int d, int lane,
                                   float (&a)[CH][kSharedDecay ? 1 : NS]) {
  constexpr int kDecays = kSharedDecay ? 1 : NS;
  if (!kSharedDecay && p.shared_decay) {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const float shared = d + c < p.channels ? __ldg(p.a + track.mk(p) * p.channels + d + c) * kLog2e : 0.f;
#pragma unroll
      for (int i = 0; i < kDecays; ++i) a[c][i] = shared;
    }
    return;
  }
  const int states = kSharedDecay ? 1 : p.states, first = kSharedDecay ? 0 : lane * NS;
  const bool quads = states % 4 == 0 && reinterpret_cast<uintptr_t>(p.a) % 16 == 0;
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const float* const from = p.a + (track.mk(p) * p.channels + d + c) * states + first;
    const int exist = d + c < p.channels ? states - first : 0;
    if constexpr (kDecays % 4 == 0) {  // each by a load of its own, all would wait for one another
      if (quads) {
#pragma unroll
        for (int i = 0; i < kDecays; i += 4) {
          const float4 quad =
              i < exist ? __ldg(reinterpret_cast<const float4*>(from + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
          a[c][i] = quad.x;
          a[c][i + 1] = quad.y;
          a[c][i + 2] = quad.z;
          a[c][i + 3] = quad.w;
        }
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kDecays; ++i) a[c][i] = i < exist ? __ldg(from + i) : 0.f;
  }
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int i = 0; i < kDecays; ++i) a[c][i] *= kLog2e;
}

// This thread's states from and to memory laid out [N, D].
template <int NS, int CH>
__device__ inline void load_state(const Params& p, const float* plane, int d, int lane, float (&h)[CH][NS]) {
  if (d >= p.channels) return;
  const float* from = plane + int64_t{lane} * NS * p.channels + d;
  const int exist = p.states - lane * NS;
  if (CH == 2 && p.channels % 2 == 0) {
#pragma unroll
    for (int i = 0; i < NS; ++i, from += p.channels) {
      if (i >= exist) break;
      const float2 pair = *reinterpret_cast<const float2*>(from);
      h[0][i] = pair.x;
      h[CH - 1][i] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NS; ++i, from += p.channels)
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (i < exist && d + c < p.channels) h[c][i] = from[c];
  }
}
template <int NS, int CH>
__device__ inline void store_state(const Params& p, float* plane, int d, int lane, const float (&h)[CH][NS]) {
  if (d >= p.channels) return;
  float* to = plane + int64_t{lane} * NS * p.channels + d;
  const int exist = p.states - lane * NS;
  if (CH == 2 && p.channels % 2 == 0) {
#pragma unroll
    for (int i = 0; i < NS; ++i, to += p.channels) {
      if (i >= exist) break;
      *reinterpret_cast<float2*>(to) = make_float2(h[0][i], h[CH - 1][i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < NS; ++i, to += p.channels)
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (i < exist && d + c < p.channels) to[c] = h[c][i];
  }
}

// Turns the summaries of the chunks (end state from a zero start; the decay of a chunk is exp(A * its sum of steps))
// into the state that enters each chunk, in place; along the scan, or against it for the gradients (`backwards`). The
// last chunk has no summary.
// A block takes `across` neighbouring values of the states' plane at a time, at least a sector of memory. As many
// chunks of them as its shared memory holds are copied there, each thread folds a run of these, the block scans the
// runs, each thread walks its run again; then the next chunks. All of the block's shared memory is overwritten, and
// threads may still read it on return.
__device__ inline void prefix_chunks(const Params& p, bool backwards, float* shared) {
  const int plane = p.states * p.channels, sequences = p.modalities * p.batch * p.paths * plane;
  int shared_bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(shared_bytes));
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int across = 8;  // more where blocks would take several turns, but then of one state
  const auto fits = [&](int wider) { return threads % wider == 0 && p.channels % wider == 0; };
  while (fits(2 * across) && sequences / across > static_cast<int>(gridDim.x)) across *= 2;
  const int runs = threads / across, run = thread / across;
  const int place = thread % across;
  // An odd number of chunks in a run: then runs begin in different banks.
  const int most = (shared_bytes / 4 - 2 * threads) / (2 * threads), wanted = (p.chunks + runs - 1) / runs;
  const int length = min((most - 1) | 1, wanted | 1), at_once = length * runs;
  float2* const folds = reinterpret_cast<float2*>(shared);
  float* const summaries = shared + 2 * threads;
  float* const decays = summaries + at_once * across;  // first the steps
  const bool quads = p.channels % across == 0;         // then values have all but the channel in common

#pragma unroll 1
  for (int first = blockIdx.x * across; first < sequences; first += gridDim.x * across) {
    const int i = min(first + place, sequences - 1);  // past the end: the last once more, not written
    const int mbk = i / plane, in_plane = i - mbk * plane, n = in_plane / p.channels, d = in_plane - n * p.channels;
    const int mb = mbk / p.paths, k = mbk - mb * p.paths;
    const int64_t mkd = int64_t{mb / p.batch * p.paths + k} * p.channels + d;
    const float a = (p.shared_decay ? p.a[mkd] : p.a[mkd * p.states + n]) * kLog2e;
    const bool descending = (p.path[k] >= 2) != backwards;
    const int64_t at = int64_t{mbk} * p.chunks + (descending ? p.chunks - 1 : 0);
    const int64_t next_state = descending ? -plane : plane, next_steps = descending ? -p.channels : p.channels;
    float* const states = p.chunk_state + at * plane + in_plane;
    const float* const steps = p.chunk_steps + at * p.channels + d;
    float carry = 0.f;  // what enters the first of the chunks
#pragma unroll 1
    for (int begin = 0; begin < p.chunks; begin += at_once) {
      const int chunks = min(p.chunks - begin, at_once), known = min(p.chunks - 1 - begin, at_once);
      __syncthreads();  // nobody reads what was here before
      auto copy = [&](auto bytes, int first_chunk, int chunks_apart, int to) {
#pragma unroll 2
        for (int j = first_chunk; j < known; j += chunks_apart) {
          const char* const state = reinterpret_cast<const char*>(states + (to - place) + (begin + j) * next_state);
          const char* const step = reinterpret_cast<const char*>(steps + (to - place) + (begin + j) * next_steps);
          copy_async<decltype(bytes)::value>(shared_address(summaries + j * across + to), state);
          copy_async<decltype(bytes)::value>(shared_address(decays + j * across + to), step);
        }
      };
      if (quads) {
        copy(std::integral_constant<int, 16>(), thread / (across / 4), threads / (across / 4),
             thread % (across / 4) * 4);
      } else {
        copy(std::integral_constant<int, 4>(), run, runs, place);
      }
      copies_commit();
      copies_wait();
      __syncthreads();
      const int from = run * length, to = min(from + length, known);
      float folded = 0.f, step_sum = 0.f;
#pragma unroll 4
      for (int j = from; j < to; ++j) {
        float& step = decays[j * across + place];
        const float decay = exp2_fast(a * step);
        step_sum += step;
        step = decay;
        folded = fmaf(decay, folded, summaries[j * across + place]);
      }
      folds[thread] = make_float2(exp2_fast(a * step_sum), folded);
      __syncthreads();
      float running = carry;
#pragma unroll 4
      for (int r = 0; r < runs; ++r) {
        if (r == run) running = carry;
        const float2 fold = folds[r * across + place];
        carry = fmaf(fold.x, carry, fold.y);
      }
      if (first + place < sequences) {
#pragma unroll 4
        for (int j = from; j < min(from + length, chunks); ++j) {
          states[(begin + j) * next_state] = running;
          if (j < known) running = fmaf(decays[j * across + place], running, summaries[j * across + place]);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace diffmf
