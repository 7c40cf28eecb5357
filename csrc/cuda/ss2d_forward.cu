// Forward pass of ss2d in one cooperative launch.
//
// M * B * K sequences of L tokens are far too few to fill a GPU, so the axis is cut into chunks and scanned in three
// phases with grid barriers between them:
//
//   1. every (path, chunk) but the last along the path: end state from a zero start, and the sum of its steps;
//   2. a scan over the chunks turns those into the state that enters each chunk (prefix_chunks);
//   3. every chunk again, from its true start, now writing y.
//
// With one chunk, phases 1 and 2 vanish. A walk along a chunk is the work of one warp alone, with shared memory of its
// own: no block barriers. A block is two warps. Paths are taken in rounds; where an axis has paths of both senses, a
// round is such a pair: the warps of a block walk the same chunk from its two ends and change halves in the middle,
// behind a barrier. The first to visit a token stores its part of y, later ones add theirs with a reduction that
// returns nothing; barriers order them, so each element of y is summed in the same order on every run.
#include <algorithm>
#include <vector>

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kMinBlocks = 6;  // a multiprocessor holds: at most 168 registers a thread
constexpr int kTile = 8;       // tokens staged at a time; divides kCheckpoint, so tiles never straddle a piece
constexpr int kTokenLanes = 32 / kTile;  // lanes that copy one token of a tile: fewer would copy less of a row at once
static_assert(kCheckpoint % kTile == 0, "tiles must not straddle pieces");

struct Round {
  int path[kWarps];  // of the two warps; path[1] is -1 when the round has one path, and the warps take two chunks
};

struct ForwardParams : Params {
  void* y;              // [M, B, L, D]
  float* sum;           // [M, B, L, D], y while paths are still missing; y itself when it is float
  float* saved_states;  // [M, B, K, pieces, N, D] or null
  float* last_state;    // [M, B, K, N, D] or null
  Round round[kMaxPaths];
  int rounds;
  // Shared memory of a warp, offsets in bytes. Two tiles of rows and activations are in flight.
  int bases_at, offsets_at, rows_at, decoded_at, x_at, delta_at, steps_at, channels_at, warp_bytes;
};

// Where a thread stands.
struct Seat {
  int lane, c;                // lane of the channel, first channel within the block of channels
  int copy_lane, copy_token;  // when copying a tile
  char* shared;               // of its warp
};

// One of the kTokenLanes threads' share (number `lane`) of copying `bytes` contiguous bytes to shared memory. Not
// unrolled: addresses computed ahead would cost registers.
template <int kBytes>
__device__ inline void copy_granules(uint32_t to, const char* from, int bytes, int lane) {
#pragma unroll 1
  for (int i = lane * kBytes; i < bytes; i += kBytes * kTokenLanes) copy_async<kBytes>(to + i, from + i);
}
__device__ inline void copy_row(void* to, const char* from, int bytes, int granule, int lane) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (granule == 16) {
    copy_granules<16>(at, from, bytes, lane);
  } else if (granule == 8) {
    copy_granules<8>(at, from, bytes, lane);
  } else if (granule == 4) {
    copy_granules<4>(at, from, bytes, lane);
  } else {  // 16-bit rows that start on odd elements: cp.async cannot
#pragma unroll 1
    for (int i = lane * 2; i < bytes; i += kTokenLanes * 2)
      *reinterpret_cast<uint16_t*>(static_cast<char*>(to) + i) = *reinterpret_cast<const uint16_t*>(from + i);
  }
}

// The proj row of one token into a staged row of the same element type: [B, padded | C, padded | low rank]; C if kC.
template <bool kC>
__device__ inline void copy_proj(const Params& p, const Bases& bases, int pixel, char* to, int lane) {
  const int element = p.element(), granule = p.proj.granule, bytes = p.states * element;
  const char* bc = bases.bc + int64_t{pixel} * p.proj.pixel;
  if (kC && p.padded_states == p.states) {
    copy_row(to, bc, 2 * bytes, granule, lane);
  } else {
    copy_row(to, bc, bytes, granule, lane);
    if constexpr (kC) copy_row(to + p.padded_states * element, bc + bytes, bytes, granule, lane);
  }
  if (p.rank > 0)
    copy_row(to + 2 * p.padded_states * element, bases.low + int64_t{pixel} * p.proj.pixel, p.rank * element, granule,
             lane);
}

// Rows of the staged channels, the rank rounded up to a multiple of 4.
inline __host__ __device__ int staged_rows(int rank) {
  return kWeightRows + (rank > kMinRank ? (rank + 3) / 4 * 4 : kMinRank);
}
// The first of the staged channels' values, for a thread's channels; `channels` is at the first of them. kHeld: rows of
// dt_weight among them, at most kMinRank.
template <int CH, int kHeld>
struct StepWeights {
  float bias[CH], w[kHeld][CH];
  __device__ StepWeights(const Params& p, const float* channels) {
    read_floats<CH>(channels + kBiasRow * p.block_channels, bias);
#pragma unroll
    for (int r = 0; r < kHeld; ++r) read_floats<CH>(channels + (kWeightRows + r) * p.block_channels, w[r]);
  }
};

// dt_bias + low rank * dt_weight of one token (0 < rank <= kHeld), from its staged row; zeros follow the low-rank part.
template <int CH, int kHeld>
__device__ inline void held_raw(const Params& p, const float* row, const StepWeights<CH, kHeld>& weights,
                                float (&raw)[CH]) {
  float low[kHeld];
  read_floats<kHeld>(row + 2 * p.padded_states, low);
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    raw[c] = weights.bias[c];
#pragma unroll
    for (int r = 0; r < kHeld; ++r) raw[c] = fmaf(low[r], weights.w[r][c], raw[c]);
  }
}

// Likewise for any rank > 0 and kSide tokens, `stride` values apart: what is read of the weights serves all of them.
template <int CH, int kSide>
__device__ inline void raw_side_by_side(const Params& p, const float* row, int stride, const float* channels,
                                        float (&raw)[kSide][CH]) {
  float bias[CH];
  read_floats<CH>(channels + kBiasRow * p.block_channels, bias);
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int c = 0; c < CH; ++c) raw[i][c] = bias[c];
  const float* low = row + 2 * p.padded_states;
  const float* weights = channels + kWeightRows * p.block_channels;
#pragma unroll 1
  for (int r = 0; r < p.rank; r += 4, low += 4, weights += 4 * p.block_channels) {  // zeros follow the last rank
    float w[4][CH];
#pragma unroll
    for (int k = 0; k < 4; ++k) read_floats<CH>(weights + k * p.block_channels, w[k]);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      float quad[4];
      read_floats<4>(low + i * stride, quad);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int c = 0; c < CH; ++c) raw[i][c] = fmaf(quad[k], w[k][c], raw[i][c]);
    }
  }
}

// Adds v, CH neighbouring channels, to what is at `to`, aligned; or stores it there. Memory is not clobbered: barriers
// order these statements, and between barriers the next token's loads may pass them.
template <int CH>
__device__ inline void merge(float* to, bool store, const float (&v)[CH]) {
  static_assert(CH <= 2, "one store");
  if (!store) {
    add_at<CH>(to, v);
  } else if constexpr (CH == 2) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v[0]), "f"(v[1]));
  } else {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(v[0]));
  }
}

struct ForwardBases : Bases {
  float* sum;   // first channel of the block
  int64_t mbk;  // number of the track
  __device__ ForwardBases(const ForwardParams& p, const Track& t) : Bases(p, t) {
    sum = p.sum + (int64_t{t.m} * p.batch + t.b) * p.tokens * p.channels + t.first_d;
    mbk = t.mbk(p);
  }
};

// The steps of the thread's channels at its share of a tile's tokens, into `steps`, rows of block_channels; kSide
// tokens at a time, which its share is a multiple of.
template <int CH, int kSide>
__device__ inline void compute_steps(const ForwardParams& p, const Seat& seat, const float* rows, const float* channels,
                                     const char* raw_delta, float* steps) {
#pragma unroll 1
  for (int t = seat.lane; t < kTile; t += kSide * p.state_lanes) {
    float raw[kSide][CH];
    if (p.rank > 0) {
      raw_side_by_side(p, rows + t * p.pitch, p.state_lanes * p.pitch, channels, raw);
    } else {
      float bias[CH];
      read_floats<CH>(channels + kBiasRow * p.block_channels, bias);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const char* const row = raw_delta + (t + i * p.state_lanes) * p.block_channels * p.element();
        if (p.half) {
          read_activation<CH, true>(p, row, seat.c, raw[i]);
        } else {
          read_activation<CH, false>(p, row, seat.c, raw[i]);
        }
#pragma unroll
        for (int c = 0; c < CH; ++c) raw[i][c] += bias[c];
      }
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (p.softplus) {
#pragma unroll
        for (int c = 0; c < CH; ++c) raw[i][c] = softplus(raw[i][c]);
      }
      write_floats<CH>(steps + (t + i * p.state_lanes) * p.block_channels, raw[i]);
    }
  }
}

// 16-bit values staged at `from` as floats at `to`; `count` is a multiple of 4.
__device__ inline void decode_staged(const char* from, float* to, int count, DType dtype) {
#pragma unroll 1
  for (int i = threadIdx.x % 32 * 4; i < count; i += 32 * 4)
    *reinterpret_cast<float4*>(to + i) = decode_quad(from + i * 2, dtype);
}

// A shared decay is that of all states of a channel, so it need not be multiplied into each of them at every token:
// within a tile they are kept divided by the decay since the tile began, `since`, and made whole at its end, or before
// that falls below this.
constexpr float kLeastSince = 0x1p-40f;
constexpr int kSide = 4;                       // tokens whose decays are looked at together
__device__ inline float reciprocal(float v) {  // relative error 2^-23
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
template <int NS, int CH>
__device__ inline void make_whole(float (&h)[CH][NS], float (&since)[CH]) {
#pragma unroll
  for (int c = 0; c < CH; ++c) {
#pragma unroll
    for (int n = 0; n < NS; ++n) h[c][n] *= since[c];
    since[c] = 1.f;
  }
}

// Walks tokens [from, to) of the axis along one path. `a` and h are the thread's decays and its state, in and out.
// Summaries (!kOutput) also add up the steps. `visits_first`: nobody has written y of these tokens yet.
// Summaries with a shared decay are taken from the end: what a token leaves there is its input, times the decay of all
// after it, times B.
// kHeld > 0: the thread holds all states of its channels, which exist all or none, and the weights of their low-rank
// part, whose rank is at most kHeld; the step is its softplus, and is computed where the token is scanned. Otherwise
// the lanes of a channel share the work of a tile's steps beforehand.
template <int NS, int CH, bool kSharedDecay, bool kZoh, int kHeld, bool kOutput>
__device__ void walk(const ForwardParams& p, const Seat& seat, const Track& track, int from, int to, bool visits_first,
                     const float (&a)[CH][kSharedDecay ? 1 : NS], float (&h)[CH][NS], float (&step_sum)[CH]) {
  constexpr bool kAlone = kHeld > 0;
  constexpr int kQuad = NS < 4 ? NS : 4;
  const int tiles = (to - from + kTile - 1) / kTile;
  const ForwardBases& bases = *reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at);
  constexpr bool kFromEnd = kSharedDecay && !kOutput;
  const bool descending = track.reversed != kFromEnd;
  float after[CH];  // from the end: the decay of all tokens after this one
#pragma unroll
  for (int c = 0; c < CH; ++c) after[c] = 1.f;
  auto first_token = [&](int tile) { return from + (descending ? tiles - 1 - tile : tile) * kTile; };
  // Starts the copies of a tile and notes where its tokens are in y. Past the end: the last token once more.
  auto issue = [&](int tile) {
    const int lane = opaque(seat.copy_lane), element = opaque(p.element());
    const int real_bytes = min(p.block_channels, p.channels - opaque(track.first_d)) * element;
    const int pixel = track.pixel(p, min(first_token(tile) + opaque(seat.copy_token), to - 1));
    const int slot = (tile & 1) * kTile + opaque(seat.copy_token), x_bytes = p.block_channels * element;
    char* const shared = seat.shared + opaque(0);
    if (kOutput && lane == 0) reinterpret_cast<int64_t*>(shared + p.offsets_at)[slot] = int64_t{pixel} * p.channels;
    copy_proj<kOutput>(p, bases, pixel, shared + p.rows_at + slot * p.pitch * element, lane);
    copy_row(shared + p.x_at + slot * x_bytes, bases.x + int64_t{pixel} * p.x.pixel, real_bytes, p.x.granule, lane);
    if (!kAlone && p.rank == 0)
      copy_row(shared + p.delta_at + slot * x_bytes, bases.delta + int64_t{pixel} * p.delta.pixel, real_bytes,
               p.delta.granule, lane);
    copies_commit();
  };

  const float* const channels = reinterpret_cast<const float*>(seat.shared + p.channels_at) + seat.c;
  const StepWeights<CH, kAlone ? kHeld : 1> weights(p, channels);  // read where the thread is alone
  float skip[CH] = {};
  if constexpr (kOutput) read_floats<CH>(channels + kSkipRow * p.block_channels, skip);

  issue(0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int q0 = first_token(tile), buffer = (tile & 1) * kTile;
    char* const shared = seat.shared + opaque(0);
    const float* rows = reinterpret_cast<const float*>(shared + p.rows_at + buffer * p.pitch * p.element());
    const float* x_rows = reinterpret_cast<const float*>(shared + p.x_at + buffer * p.block_channels * p.element());
    copies_wait();
    __syncwarp();
    if (tile + 1 < tiles) issue(tile + 1);  // into the buffer that everyone has left
    if (p.half) {
      float* const decoded = reinterpret_cast<float*>(shared + p.decoded_at);
      decode_staged(reinterpret_cast<const char*>(rows), decoded, kTile * p.pitch, p.dtype);
      decode_staged(reinterpret_cast<const char*>(x_rows), decoded + kTile * p.pitch, kTile * p.block_channels,
                    p.dtype);
      rows = decoded;
      x_rows = decoded + kTile * p.pitch;
      __syncwarp();
    }
    const float* steps = reinterpret_cast<const float*>(shared + p.steps_at) + seat.c;
    if constexpr (!kAlone) {
      const char* const raw_delta = shared + p.delta_at + buffer * p.block_channels * p.element();
      if (p.state_lanes <= kTile / 4) {
        compute_steps<CH, 4>(p, seat, rows, channels, raw_delta, const_cast<float*>(steps));
      } else {
        compute_steps<CH, 1>(p, seat, rows, channels, raw_delta, const_cast<float*>(steps));
      }
      __syncwarp();
    }

    if constexpr (kOutput) {
      const bool enters_piece =
          track.reversed ? (q0 + kTile) % int{kCheckpoint} == 0 || q0 + kTile >= p.tokens : q0 % int{kCheckpoint} == 0;
      if (p.saved_states != nullptr && enters_piece) {
        const int64_t piece = bases.mbk * p.pieces() + q0 / int{kCheckpoint};
        store_state<NS, CH>(p, p.saved_states + piece * p.states * p.channels, opaque(track.first_d) + seat.c,
                            seat.lane, h);
      }
    }

    const int count = min(kTile, to - q0), first = descending ? count - 1 : 0;
    const int sense = descending ? -1 : 1;
    const int row_step = descending ? -p.pitch : p.pitch;
    const int x_step = descending ? -p.block_channels : p.block_channels;
    const float* row = rows + first * p.pitch;
    const float* x_row = x_rows + first * p.block_channels + seat.c;
    const int64_t* offset = reinterpret_cast<const int64_t*>(shared + p.offsets_at) + buffer + first;
    if constexpr (!kAlone) steps += first * p.block_channels;
    // Of the token at `row`: x, its step, and what goes into the state; with a shared decay, that too.
    auto read_token = [&](const float* row, const float* x_row, const float* steps, float (&x)[CH], float (&step)[CH],
                          float (&input)[CH], float (&decay)[CH]) {
      read_floats<CH>(x_row, x);
      if constexpr (kAlone) {
        held_raw(p, row, weights, step);
#pragma unroll
        for (int c = 0; c < CH; ++c) step[c] = softplus(step[c]);
      } else {
        read_floats<CH>(steps, step);
      }
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        input[c] = kZoh ? x[c] : step[c] * x[c];
        if constexpr (!kOutput) step_sum[c] += step[c];
        if constexpr (kSharedDecay) {
          decay[c] = exp2_fast(step[c] * a[c][0]);
          if constexpr (kZoh) input[c] *= zoh_weight(step[c], step[c] * (a[c][0] * kLn2), decay[c], a[c][0] * kLn2);
        }
      }
    };
    // Its part in the states, and what they put out.
    auto scan_token = [&](const float* row, const float (&step)[CH], const float (&input)[CH], float (&y)[CH]) {
      const float* const bc = kAlone ? row : row + seat.lane * NS;
      float partial[CH][2] = {};
#pragma unroll
      for (int first = 0; first < NS; first += kQuad) {
        float b[kQuad], cc[kQuad];
        read_floats<kQuad>(bc + first, b);
        if constexpr (kOutput) read_floats<kQuad>(bc + p.padded_states + first, cc);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            float& state = h[c][first + j];
            if constexpr (kSharedDecay) {
              state = fmaf(input[c], b[j], state);
            } else {
              const float a_j = a[c][first + j], decay = exp2_fast(step[c] * a_j);
              float u = input[c];
              if constexpr (kZoh) u *= zoh_weight(step[c], step[c] * (a_j * kLn2), decay, a_j * kLn2);
              state = fmaf(decay, state, u * b[j]);
            }
            if constexpr (kOutput) partial[c][j % 2] = fmaf(cc[j], state, partial[c][j % 2]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        y[c] = partial[c][0] + partial[c][1];
        if constexpr (kOutput && !kAlone)
          for (int off = 1; off < p.state_lanes; off *= 2) y[c] += __shfl_xor_sync(0xffffffffu, y[c], off);
      }
    };
    auto write_token = [&](int64_t offset, const float (&x)[CH], float (&y)[CH]) {
#pragma unroll
      for (int c = 0; c < CH; ++c) y[c] = fmaf(skip[c], x[c], y[c]);
      float* const to = bases.sum + offset + seat.c;
      const int exist = p.channels - track.first_d - seat.c;
      if (kAlone || p.channels % CH == 0) {
        if (exist > 0 && (kAlone || seat.lane == 0)) merge<CH>(to, visits_first, y);
      } else if (seat.lane == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const float one[1] = {y[c]};
          if (c < exist) merge<1>(to + c, visits_first, one);
        }
      }
    };
    if constexpr (kSharedDecay && kOutput) {
      float since[CH];
#pragma unroll
      for (int c = 0; c < CH; ++c) since[c] = 1.f;
#pragma unroll 1
      for (int i = 0; i < count; i += kSide) {
        float x[kSide][CH], step[CH], input[kSide][CH], decay[CH], at[kSide][CH], y[CH];
        bool fits = i + kSide <= count;
        if (fits) {
#pragma unroll
          for (int j = 0; j < kSide; ++j) {
            read_token(row + j * row_step, x_row + j * x_step, steps + j * x_step, x[j], step, input[j], decay);
#pragma unroll
            for (int c = 0; c < CH; ++c) {
              at[j][c] = (j == 0 ? since[c] : at[j - 1][c]) * decay[c];
              fits = fits && at[j][c] >= kLeastSince;
            }
          }
        }
        if (fits) {
#pragma unroll
          for (int j = 0; j < kSide; ++j) {
#pragma unroll
            for (int c = 0; c < CH; ++c) input[j][c] *= reciprocal(at[j][c]);
            scan_token(row + j * row_step, step, input[j], y);
#pragma unroll
            for (int c = 0; c < CH; ++c) y[c] *= at[j][c];
            write_token(offset[j * sense], x[j], y);
          }
#pragma unroll
          for (int c = 0; c < CH; ++c) since[c] = at[kSide - 1][c];
        } else {
#pragma unroll 1
          for (int j = 0; j < min(kSide, count - i); ++j) {
            read_token(row + j * row_step, x_row + j * x_step, steps + j * x_step, x[0], step, input[0], decay);
#pragma unroll
            for (int c = 0; c < CH; ++c) since[c] *= decay[c];
            make_whole<NS, CH>(h, since);
            scan_token(row + j * row_step, step, input[0], y);
            write_token(offset[j * sense], x[0], y);
          }
        }
        row += kSide * row_step;
        x_row += kSide * x_step;
        steps += kSide * x_step;
        offset += kSide * sense;
      }
      make_whole<NS, CH>(h, since);
    } else {
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        float x[CH], step[CH], input[CH], decay[CH], y[CH];
        read_token(row, x_row, steps, x, step, input, decay);
        if constexpr (kSharedDecay) {
#pragma unroll
          for (int c = 0; c < CH; ++c) {
            input[c] *= after[c];
            after[c] *= decay[c];
          }
        }
        scan_token(row, step, input, y);
        if constexpr (kOutput) write_token(*offset, x, y);
        row += row_step;
        x_row += x_step;
        if constexpr (!kAlone) steps += x_step;
        offset += sense;
      }
    }
  }
}

template <int NS, int CH, bool kSharedDecay, bool kZoh, int kHeld>
__global__ void __launch_bounds__(32 * kWarps, kMinBlocks)
    ss2d_forward_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ float4 shared_base[];
  const auto grid = cooperative_groups::this_grid();
  const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
  const Seat seat = {in_warp & (p.state_lanes - 1), (in_warp >> p.lane_shift) * CH, in_warp % kTokenLanes,
                     in_warp / kTokenLanes, reinterpret_cast<char*>(shared_base) + warp * p.warp_bytes};
  const int64_t plane = int64_t{p.states} * p.channels;
  const int tasks = p.modalities * p.batch * p.groups * p.chunks;  // (sequence, chunk)

  // Zeros where staged rows are padded: B and C of states that do not exist.
  for (int i = in_warp * 4; i < p.warp_bytes; i += 32 * 4) *reinterpret_cast<float*>(seat.shared + i) = 0.f;
  __syncwarp();
  // The track of a path of a sequence (modality, batch item, channel block), the last fastest.
  auto track_of = [&](int sequence, int path) {
    const Track track(p, sequence / p.groups, path, sequence % p.groups);
    __syncwarp();  // nobody reads what the walk before needed
    stage_channels(p, track, reinterpret_cast<float*>(seat.shared + p.channels_at), in_warp, 32, staged_rows(p.rank));
    if (in_warp == 0) *reinterpret_cast<ForwardBases*>(seat.shared + p.bases_at) = ForwardBases(p, track);
    __syncwarp();
    return track;
  };

  if (p.chunks > 1) {
    const int summaries = p.chunks - 1, items = tasks / p.chunks * summaries * p.paths;  // nothing enters from the last
    for (int item = blockIdx.x * kWarps + warp; item < items; item += gridDim.x * kWarps) {
      const int nth = item / p.paths, path = item % p.paths, sequence = nth / summaries;
      const Track track = track_of(sequence, path);
      const int chunk = nth - sequence * summaries + (track.reversed ? 1 : 0), begin = chunk * p.chunk;
      const int d = track.first_d + seat.c;
      float a[CH][kSharedDecay ? 1 : NS], h[CH][NS] = {}, step_sum[CH] = {};
      load_decays<NS, CH, kSharedDecay>(p, track, d, seat.lane, a);
      walk<NS, CH, kSharedDecay, kZoh, kHeld, false>(p, seat, track, begin, min(begin + p.chunk, p.tokens), false, a, h,
                                                     step_sum);
      const int64_t at = track.mbk(p) * p.chunks + chunk;
      store_state<NS, CH>(p, p.chunk_state + at * plane, d, seat.lane, h);
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (seat.lane == 0 && d + c < p.channels) p.chunk_steps[at * p.channels + d + c] = step_sum[c];
    }
    grid.sync();
    prefix_chunks<kSharedDecay>(
        p, false, reinterpret_cast<float2*>(reinterpret_cast<char*>(shared_base) + kWarps * p.warp_bytes));
    grid.sync();
  }

#pragma unroll 1
  for (int r = 0; r < p.rounds; ++r) {
    if (r > 0) grid.sync();
    const bool pair = p.round[r].path[1] >= 0;
    const int path = p.round[r].path[pair ? warp : 0], tasks_per_block = pair ? 1 : kWarps;
    for (int first = blockIdx.x * tasks_per_block; first < tasks; first += gridDim.x * tasks_per_block) {
      const int task = first + (pair ? 0 : warp);
      const bool works = task < tasks;
      const Track track = track_of(works ? task / p.chunks : 0, path);
      const int chunk = task % p.chunks;
      const int begin = chunk * p.chunk, end = min(begin + p.chunk, p.tokens);
      const int middle = min(begin + (end - begin + 2 * kTile - 1) / (2 * kTile) * kTile, end);
      const int d = track.first_d + seat.c;
      float a[CH][kSharedDecay ? 1 : NS], h[CH][NS] = {}, unused[CH];
      load_decays<NS, CH, kSharedDecay>(p, track, d, seat.lane, a);
      if (works && p.chunks > 1)
        load_state<NS, CH>(p, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane, d, seat.lane, h);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const bool upper = (part == 1) != track.reversed;
        const int from = upper ? middle : begin, to = upper ? end : middle;
        if (works && from < to)
          walk<NS, CH, kSharedDecay, kZoh, kHeld, true>(p, seat, track, from, to, r == 0 && (part == 0 || !pair), a, h,
                                                        unused);
        __syncthreads();  // the other warp's half is written
      }
      const bool final_chunk = chunk == (track.reversed ? 0 : p.chunks - 1);
      if (works && p.last_state != nullptr && final_chunk)
        store_state<NS, CH>(p, p.last_state + track.mbk(p) * plane, d, seat.lane, h);
    }
  }

  if (p.half) {  // the sum over paths is complete: write it in its own type
    grid.sync();
    const int64_t count = int64_t{p.modalities} * p.batch * p.tokens * p.channels;
    const int64_t stride = int64_t{gridDim.x} * blockDim.x, start = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (int64_t i = start; i < count / 4; i += stride) {
      const float4 v = reinterpret_cast<const float4*>(p.sum)[i];
      const ushort4 bits = {encode(v.x, p.dtype), encode(v.y, p.dtype), encode(v.z, p.dtype), encode(v.w, p.dtype)};
      static_cast<ushort4*>(p.y)[i] = bits;
    }
    for (int64_t i = count / 4 * 4 + start; i < count; i += stride)
      static_cast<uint16_t*>(p.y)[i] = encode(p.sum[i], p.dtype);
  }
}

using ForwardKernel = void (*)(ForwardParams);

// A thread's share: NS states of CH channels. Zero-order hold, shared decays and channels shared by several threads are
// compiled for fewer shares.
struct Share {
  int states, channels;
};
constexpr Share kShares[] = {{16, 2}, {16, 1}, {8, 2}, {8, 1}, {4, 2}, {1, 2}, {1, 1}};

// The greatest rank with which a thread can be alone: its weights are kept in registers.
constexpr int most_held(int64_t states) { return states == 1 ? 8 : 4; }
// The most common shares have a kernel of their own for ranks up to 2.
template <int NS, int CH, bool kSharedDecay>
ForwardKernel alone_with(int64_t rank) {
  if constexpr (NS == 8 || (NS == 16 && CH == 2)) {
    if (rank <= 2) return ss2d_forward_kernel<NS, CH, kSharedDecay, false, 2>;
  }
  return ss2d_forward_kernel<NS, CH, kSharedDecay, false, most_held(NS)>;
}
template <bool kSharedDecay>
ForwardKernel alone_kernel(const Share& share, int64_t rank) {
  if (share.channels == 2) {
    if (share.states == 16) return alone_with<16, 2, kSharedDecay>(rank);
    if (share.states == 8) return alone_with<8, 2, kSharedDecay>(rank);
    if (share.states == 4) return alone_with<4, 2, kSharedDecay>(rank);
  } else {
    if (share.states == 16) return alone_with<16, 1, kSharedDecay>(rank);
    if (share.states == 8) return alone_with<8, 1, kSharedDecay>(rank);
  }
  if constexpr (!kSharedDecay) {
    if (share.states == 1 && share.channels == 2) return alone_with<1, 2, kSharedDecay>(rank);
    if (share.states == 1 && share.channels == 1) return alone_with<1, 1, kSharedDecay>(rank);
  }
  return nullptr;
}
template <bool kSharedDecay, bool kZoh>
ForwardKernel shared_kernel(const Share& share) {
  if (share.channels != 2) return nullptr;
  if constexpr (!kZoh) {
    if (share.states == 16) return ss2d_forward_kernel<16, 2, kSharedDecay, kZoh, 0>;
  }
  if (share.states == 4) return ss2d_forward_kernel<4, 2, kSharedDecay, kZoh, 0>;
  if constexpr (!kSharedDecay && !kZoh) {
    if (share.states == 1) return ss2d_forward_kernel<1, 2, kSharedDecay, kZoh, 0>;
  }
  return nullptr;
}
bool is_alone(const SS2DProblem& problem, const Share& share) {
  return share.states >= problem.states && problem.channels % share.channels == 0 && problem.rank > 0 &&
         problem.rank <= most_held(share.states) && problem.softplus && problem.discretization == Discretization::euler;
}
// Null where it was not compiled.
ForwardKernel kernel_of(const SS2DProblem& problem, const Share& share) {
  const bool zoh = problem.discretization == Discretization::zoh, shared_decay = has_shared_decay(problem);
  if (is_alone(problem, share))
    return shared_decay ? alone_kernel<true>(share, problem.rank) : alone_kernel<false>(share, problem.rank);
  if (shared_decay) return zoh ? shared_kernel<true, true>(share) : shared_kernel<true, false>(share);
  return zoh ? shared_kernel<false, true>(share) : shared_kernel<false, false>(share);
}

Layout layout_of(const SS2DProblem& problem) {
  // The share with the least work for a token: instructions per state, channel and warp, estimated.
  Layout best;
  double least = 0;
  for (const Share& share : kShares) {
    if (kernel_of(problem, share) == nullptr) continue;
    int lanes = 1;
    while (share.states * lanes < problem.states) lanes *= 2;
    if (lanes > 32) continue;
    const int block_channels = 32 / lanes * share.channels;
    const int64_t groups = ceil_div(problem.channels, block_channels);
    const double work = groups * (5.0 * share.states * share.channels + 20.0 * share.channels / lanes + 30.0);
    if (least > 0 && work >= least) continue;
    least = work;
    best.states_per_thread = share.states;
    best.channels_per_thread = share.channels;
    best.state_lanes = lanes;
    best.block_channels = block_channels;
    best.groups = static_cast<int>(groups);
  }
  best.threads = 32 * kWarps;
  best.finish(problem);
  return best;
}

// Shared memory of a warp.
void lay_out(const SS2DProblem& problem, const Layout& layout, bool alone, ForwardParams& params) {
  const int element = problem.dtype == DType::f32 ? 4 : 2;
  SharedBytes shared;
  params.bases_at = shared.reserve(sizeof(ForwardBases));
  params.offsets_at = shared.reserve(2 * kTile * 8);
  params.rows_at = shared.reserve(2 * kTile * layout.pitch * element);
  params.decoded_at = element == 2 ? shared.reserve(kTile * (layout.pitch + layout.block_channels) * 4) : 0;
  params.x_at = shared.reserve(2 * kTile * layout.block_channels * element);
  params.delta_at = problem.rank == 0 ? shared.reserve(2 * kTile * layout.block_channels * element) : 0;
  params.steps_at = alone ? 0 : shared.reserve(kTile * layout.block_channels * 4);
  params.channels_at = shared.reserve(staged_rows(static_cast<int>(problem.rank)) * layout.block_channels * 4);
  params.warp_bytes = shared.count;
}

Plan plan_of(const SS2DProblem& problem, ForwardParams& params) {
  Layout layout = layout_of(problem);
  const Share share = {layout.states_per_thread, layout.channels_per_thread};
  const bool alone = is_alone(problem, share);
  lay_out(problem, layout, alone, params);
  layout.shared_bytes = size_t(params.warp_bytes) * kWarps + layout.threads * sizeof(float2);  // for prefix_chunks
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel_of(problem, share)), layout);
  params.rounds = 0;
  int tasks_per_block = kWarps;
  for (int axis = 0; axis < 2; ++axis) {
    std::vector<int> senses[2];
    for (int k = 0; k < problem.paths; ++k)
      if ((problem.path[k] & 1) == axis) senses[problem.path[k] >= 2].push_back(k);
    const size_t pairs = std::min(senses[0].size(), senses[1].size());
    for (size_t i = 0; i < pairs; ++i) params.round[params.rounds++] = {{senses[0][i], senses[1][i]}};
    if (pairs > 0) tasks_per_block = 1;
    for (const auto& paths : senses)
      for (size_t i = pairs; i < paths.size(); ++i) params.round[params.rounds++] = {{paths[i], -1}};
  }
  // Chunks are walked twice, so a third of the device without them is as good as all of it with them.
  Plan plan = chunk_plan(problem, layout, problem.modalities * problem.batch * layout.groups,
                         int64_t{resident} * tasks_per_block, 3, 2 * kTile);
  plan.grid = std::max<int64_t>(1, std::min<int64_t>(resident, ceil_div(plan.tasks, tasks_per_block)));
  if (problem.dtype != DType::f32)
    plan.sum_at = plan.reserve(problem.modalities * problem.batch * problem.tokens() * problem.channels);
  return plan;
}

}  // namespace

size_t ss2d_forward_workspace(const SS2DProblem& problem) {
  ForwardParams params{};
  return plan_of(problem, params).workspace_floats * sizeof(float);
}

void ss2d_forward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DOutputs& outputs, void* workspace,
                  void* stream) {
  ForwardParams params{};
  const Plan plan = plan_of(problem, params);
  float* floats = static_cast<float*>(workspace);
  fill_params(params, problem, inputs, plan, floats);
  params.y = outputs.y;
  params.sum = problem.dtype == DType::f32 ? static_cast<float*>(outputs.y) : floats + plan.sum_at;
  params.saved_states = static_cast<float*>(outputs.states);
  params.last_state = static_cast<float*>(outputs.last_state);
  launch_cooperative(kernel_of(problem, {plan.layout.states_per_thread, plan.layout.channels_per_thread}), plan, params,
                     stream);
}

}  // namespace cuda
}  // namespace diffmf
