// Backward pass of ss2d in one cooperative launch.
//
// With dh_l = C_l dy_l + decay_{l+1} dh_{l+1}, the gradient of the state runs against the scan, in the same three
// phases as the forward pass: (1) every chunk's contribution to what it hands to the chunk before, (2) a scan over the
// chunks, (3) the gradients. In phase 3 a block walks its chunk against the scan, piece by piece. The state that enters
// a piece was saved by the forward pass; the piece is scanned once to keep the state at each of its tiles in shared
// memory, then its tiles are taken in reverse: a tile's states are rebuilt into registers, and the tile is walked
// backwards.
//
// Sums over channels (the gradients of B, C and of the low-rank part) are sums over the threads of a block: lanes by
// shuffles that halve the number of values at each step, warps through shared memory in a fixed order. A block
// therefore takes all blocks of channels of its chunk in turn. Where one modality's B and C serve both
// (Exchange::from_*), it takes both modalities too, so that every element of dproj has one writer and every run gives
// the same bits. The paths of an axis follow one another in the block that owns the chunk, the column paths behind a
// grid barrier, so dx is summed in a fixed order too. Parameter gradients leave as one partial sum per (batch item,
// chunk).
#include <algorithm>

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kMinBlocks = 3;  // a multiprocessor holds: at most 168 registers a thread
constexpr int kTile = 8;       // tokens staged at a time; divides kCheckpoint, so tiles never straddle a piece
constexpr int kTilesPerPiece = int{kCheckpoint} / kTile;

struct BackwardParams : Params {
  Activation dy;              // [M, B, L, D]
  const float* saved_states;  // [M, B, K, pieces, N, D]
  bool x_per_path;
  bool shared_source;    // Exchange::from_*: both modalities read one modality's B and C
  void* dx;              // [M, B, L, (K,) D]
  float* dx_sum;         // like dx while paths are still missing; dx itself when it is float
  void* dproj;           // [M, B, L, K, R + 2N]
  float* dproj_sum;      // like dproj while contributions are still missing; dproj itself when it is float
  void* ddelta;          // [M, B, L, K, D] or null
  float* ddt_weight;     // [parts, M, K, D, R]
  float* ddt_bias;       // [parts, M, K, D] or null
  float* da;             // [parts, M, K, D, N or 1]
  float* dd;             // [parts, M, K, D] or null
  int order[kMaxPaths];  // the paths sorted by axis: row paths first
  int row_paths;         // how many of them run along rows
  // Shared memory, offsets in bytes. Two tiles of rows and activations are in flight.
  int walk_at, rows_at, decoded_rows_at, x_at, dy_at, decoded_at, delta_at, token_at, slope_at, sums_at, channels_at,
      dweight_at, warp_sums_at, history_at;
  // Values between tokens: of one value a channel, and of two. More than there are channels, so that the lanes of a
  // channel, at work on different tokens, find theirs in different banks.
  int single, twin;
  int copy_lanes;  // threads that copy one token of a tile
};

// What a walk of one block along one path keeps at hand, in shared memory.
struct Walk {
  Track track;
  Bases bases;
  const char* dy;  // at pixel 0, first channel of the block
  int end;         // of the chunk
  __device__ Walk(const BackwardParams& p, const Track& t, int end)
      : track(t),
        bases(p, t),
        dy(p.dy.data + t.m * p.dy.modality + t.b * p.dy.batch + int64_t{t.first_d} * p.element()),
        end(end) {}
};
__device__ inline const Walk& begin_walk(const BackwardParams& p, const Seat& seat, const Track& track, int end) {
  Walk* const walk = reinterpret_cast<Walk*>(seat.shared + p.walk_at);
  __syncthreads();  // nobody reads what the walk before needed
  stage_channels(p, track, reinterpret_cast<float*>(seat.shared + p.channels_at), threadIdx.x, blockDim.x);
  if (threadIdx.x == 0) *walk = Walk(p, track, end);
  __syncthreads();
  return *walk;
}

// What a walk reads of a token, and so stages.
enum class Reads { b_x, c_dy, all };

// Starts the copies of the tile of tokens [q0, q0 + kTile) into buffer 0 or 1. Past the end: the last token once more.
template <Reads kReads>
__device__ inline void issue_tile(const BackwardParams& p, const Seat& seat, const Walk& walk, int q0, int buffer) {
  const int lane = opaque(seat.copy_lane), element = p.element();
  const int x_bytes = p.single * element;
  const int real_bytes = min(p.block_channels, p.channels - walk.track.first_d) * element;
  const int slot = buffer * kTile + seat.copy_token;
  if (seat.copy_token < kTile) {
    const int pixel = walk.track.pixel(p, min(q0 + seat.copy_token, walk.end - 1));
    copy_proj<kReads != Reads::c_dy, kReads != Reads::b_x, 0>(
        p, walk.bases, pixel, seat.shared + p.rows_at + slot * p.pitch * element, lane, p.copy_lanes);
    if constexpr (kReads != Reads::c_dy)
      copy_row<0>(seat.shared + p.x_at + slot * x_bytes, walk.bases.x + int64_t{pixel} * p.x.pixel, real_bytes,
                  p.x.granule, lane, p.copy_lanes);
    if constexpr (kReads != Reads::b_x)
      copy_row<0>(seat.shared + p.dy_at + slot * x_bytes, walk.dy + int64_t{pixel} * p.dy.pixel, real_bytes,
                  p.dy.granule, lane, p.copy_lanes);
    if (p.rank == 0)
      copy_row<0>(seat.shared + p.delta_at + slot * x_bytes, walk.bases.delta + int64_t{pixel} * p.delta.pixel,
                  real_bytes, p.delta.granule, lane, p.copy_lanes);
  }
  copies_commit();
}

// A staged tile, ready to be walked.
struct Tile {
  const float* rows;    // [kTile, pitch]
  const float* x;       // [kTile, single]
  const float* dy;      // [kTile, single]
  const float* tokens;  // [kTile, twin]: {step[CH], input[CH]} of CH channels each; input = step * x, or x for zoh
};

// Computes the steps (and their slopes, for Reads::all) of a staged tile and makes float of its activations; every lane
// of a channel takes its share of the tokens.
template <Reads kReads, bool kZoh, bool kHalf, int CH>
__device__ inline void compute_steps(const BackwardParams& p, const Seat& seat, const Walk& walk, const Tile& tile,
                                     int q0, int buffer) {
  const int x_bytes = p.single * (kHalf ? 2 : 4);
  const char* const raw_x = seat.shared + p.x_at + buffer * kTile * x_bytes;
  const char* const raw_dy = seat.shared + p.dy_at + buffer * kTile * x_bytes;
  float* const tokens = const_cast<float*>(tile.tokens) + seat.c * 2;
  float* const slopes = reinterpret_cast<float*>(seat.shared + p.slope_at) + seat.c;
  const float* const channels = reinterpret_cast<const float*>(seat.shared + p.channels_at) + seat.c;
  const bool partial = q0 + kTile > walk.end || walk.track.first_d + p.block_channels > p.channels;
  const StepWeights<CH> weights(p, channels);
  const int first = opaque(seat.lane);
#pragma unroll 2
  for (int t = first; t < kTile; t += p.state_lanes) {
    float raw[CH], x[CH] = {}, dy[CH] = {}, token[2 * CH], slope[CH];
    if (p.rank > 0) {
      token_raw<CH>(p, tile.rows + t * p.pitch, weights, channels, raw);
    } else {
      read_activation<CH, kHalf>(p, seat.shared + p.delta_at + (buffer * kTile + t) * x_bytes, seat.c, raw);
#pragma unroll
      for (int c = 0; c < CH; ++c) raw[c] += weights.bias[c];
    }
    if constexpr (kReads != Reads::c_dy) read_activation<CH, kHalf>(p, raw_x + t * x_bytes, seat.c, x);
    if (kReads != Reads::b_x && (kHalf || partial)) read_activation<CH, kHalf>(p, raw_dy + t * x_bytes, seat.c, dy);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      if constexpr (kReads == Reads::all) {
        const Step step = p.softplus ? softplus_step(raw[c]) : Step{raw[c], 1.f};
        token[c] = step.value;
        slope[c] = step.slope;
      } else {
        token[c] = p.softplus ? softplus(raw[c]) : raw[c];
      }
      // A token past the end or a channel that does not exist must leave state and gradients alone: step 0 means decay
      // 1, and nothing is added.
      if (partial && (q0 + t >= walk.end || walk.track.first_d + seat.c + c >= p.channels))
        token[c] = x[c] = dy[c] = slope[c] = 0.f;
      token[CH + c] = kZoh ? x[c] : token[c] * x[c];
    }
    write_floats<2 * CH>(tokens + t * p.twin, token);
    if (kHalf || partial) {
      if constexpr (kReads != Reads::c_dy) write_floats<CH>(const_cast<float*>(tile.x) + t * p.single + seat.c, x);
      if constexpr (kReads != Reads::b_x) write_floats<CH>(const_cast<float*>(tile.dy) + t * p.single + seat.c, dy);
    }
    if constexpr (kReads == Reads::all) write_floats<CH>(slopes + t * p.single, slope);
  }
}

// Waits for the tile in `buffer` and prepares it. Starts the next tile's copies by `issue_next()`.
template <Reads kReads, bool kZoh, int CH, typename F>
__device__ inline Tile prepare_tile(const BackwardParams& p, const Seat& seat, const Walk& walk, int q0, int buffer,
                                    F&& issue_next) {
  const int element = p.element(), row_bytes = p.pitch * element, x_bytes = p.single * element;
  char* const shared = seat.shared;
  copies_wait();
  __syncthreads();  // the tile is there; nobody needs the one before
  issue_next();
  Tile tile = {reinterpret_cast<const float*>(shared + p.rows_at + buffer * kTile * row_bytes),
               reinterpret_cast<const float*>(shared + p.x_at + buffer * kTile * x_bytes),
               reinterpret_cast<const float*>(shared + p.dy_at + buffer * kTile * x_bytes),
               reinterpret_cast<const float*>(shared + p.token_at)};
  if (p.half) {
    float* decoded = reinterpret_cast<float*>(shared + p.decoded_rows_at);
    for (int i = threadIdx.x * 4; i < kTile * p.pitch; i += blockDim.x * 4)
      *reinterpret_cast<float4*>(decoded + i) =
          decode_quad(shared + p.rows_at + buffer * kTile * row_bytes + i * 2, p.dtype);
    tile.rows = decoded;
    tile.x = reinterpret_cast<const float*>(shared + p.decoded_at);
    tile.dy = tile.x + kTile * p.single;
    __syncthreads();
  }
  if (p.half) {
    compute_steps<kReads, kZoh, true, CH>(p, seat, walk, tile, q0, buffer);
  } else {
    compute_steps<kReads, kZoh, false, CH>(p, seat, walk, tile, q0, buffer);
  }
  __syncwarp();  // the lanes of a channel are in one warp
  return tile;
}

template <int NS, int CH, bool kSharedDecay, bool kZoh>
__device__ inline void advance(const BackwardParams& p, const Tile& tile, const Seat& seat,
                               const float (&a)[CH][kSharedDecay ? 1 : NS], int t, float (&h)[CH][NS]) {
  float token[2 * CH], b[NS];
  read_floats<2 * CH>(tile.tokens + t * p.twin + seat.c * 2, token);
  read_floats<NS>(tile.rows + t * p.pitch + seat.lane * NS, b);
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const float shared_decay = kSharedDecay ? exp2_fast(token[c] * a[c][0]) : 0.f;
#pragma unroll
    for (int j = 0; j < NS; ++j) {
      const float a_j = a[c][kSharedDecay ? 0 : j];
      const float decay = kSharedDecay ? shared_decay : exp2_fast(token[c] * a_j);
      float input = token[CH + c];
      if constexpr (kZoh) input *= zoh_weight(token[c], token[c] * (a_j * kLn2), decay, a_j * kLn2);
      h[c][j] = fmaf(decay, h[c][j], input * b[j]);
    }
  }
}

// Phase 1: the gradient that a chunk hands to the chunk scanned before it, from a zero start, and its sum of steps.
template <int NS, int CH, bool kSharedDecay>
__device__ void summarize_chunk(const BackwardParams& p, const Seat& seat, const Track& track, int begin, int end,
                                float (&g)[CH][NS], float (&step_sum)[CH]) {
  const Walk& walk = begin_walk(p, seat, track, end);
  float a[CH][kSharedDecay ? 1 : NS];
  load_decays<NS, CH, kSharedDecay>(p, track, track.first_d + seat.c, seat.lane, a);
  const int tiles = (end - begin + kTile - 1) / kTile;
  auto first_token = [&](int tile) { return begin + (track.reversed ? tile : tiles - 1 - tile) * kTile; };
  issue_tile<Reads::c_dy>(p, seat, walk, first_token(0), 0);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const Tile tile = prepare_tile<Reads::c_dy, false, CH>(p, seat, walk, first_token(i), i & 1, [&] {
      if (i + 1 < tiles) issue_tile<Reads::c_dy>(p, seat, walk, first_token(i + 1), ~i & 1);
    });
#pragma unroll 2
    for (int j = 0; j < kTile; ++j) {
      const int t = track.reversed ? j : kTile - 1 - j;
      float token[2 * CH], dy[CH], c_row[NS];
      read_floats<2 * CH>(tile.tokens + t * p.twin + seat.c * 2, token);
      read_floats<CH>(tile.dy + t * p.single + seat.c, dy);
      read_floats<NS>(tile.rows + t * p.pitch + p.padded_states + seat.lane * NS, c_row);
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const float shared_decay = kSharedDecay ? exp2_fast(token[c] * a[c][0]) : 0.f;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          const float decay = kSharedDecay ? shared_decay : exp2_fast(token[c] * a[c][kSharedDecay ? 0 : n]);
          g[c][n] = decay * fmaf(c_row[n], dy[c], g[c][n]);
        }
        step_sum[c] += token[c];
      }
    }
  }
}

// Sums v over the lanes that differ in a bit from `first` up to below `last`. While a lane holds more than one value,
// each step also halves them: the lane whose bit is set keeps the upper half. Returns the index of v[0] among the
// values it started with; duplicates (more lanes than values) hold the same sums. kFirst and kLast are known for the
// default layout (0: taken at run time).
template <int kFirst, int kLast, int NV>
__device__ inline int sum_over_lanes(float (&v)[NV], int first, int last, int lane_id) {
  int base = 0;
  if constexpr (kLast > 0) {
    first = kFirst;
    last = kLast;
  }
  int off = first;
#pragma unroll
  for (int count = NV / 2; count >= 1; count /= 2) {
    if (off < last) {
      const bool upper = lane_id & off;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float sent = upper ? v[i] : v[i + count], kept = upper ? v[i + count] : v[i];
        v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, off);
      }
      base += upper ? count : 0;
      off *= 2;
    }
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (off < last) v[0] += __shfl_xor_sync(0xffffffffu, v[0], off);
    off *= 2;
  }
  return base;
}

// The gradients that a thread accumulates over a chunk: of its states, and of its share of the tokens.
template <int NS, int CH, bool kSharedDecay>
struct ParameterGradients {
  float a[CH][kSharedDecay ? 1 : NS];
  float bias[CH], skip[CH];
};

// Which of the contributions to a row of dproj this walk is.
struct Contribution {
  bool first_low, last_low;  // to the low-rank part: one per block of channels
  bool first_bc, last_bc;    // to B and C: as many, times the modalities that read them
  bool zero_own_bc;          // nobody reads this modality's B and C
  bool first_dx, last_dx;    // to dx: one per path
};

__device__ inline void add_to_dproj(const BackwardParams& p, int64_t to, float v, bool first, bool last) {
  if (!first) v += __ldcg(p.dproj_sum + to);
  if (last) {
    store_as(p.dproj, to, v, p);
  } else {
    p.dproj_sum[to] = v;
  }
}

// After a tile: the warps' sums become rows of dproj. Between two barriers.
__device__ inline void write_dproj(const BackwardParams& p, const Seat& seat, const Walk& walk,
                                   const Contribution& part, int q0) {
  const int row = p.row(), warps = blockDim.x / 32;
  const int lane = opaque(seat.copy_lane), t = seat.copy_token;
  if (t >= kTile || q0 + t >= walk.end) return;
  const float* const sums = reinterpret_cast<const float*>(seat.shared + p.warp_sums_at) + t * p.pitch;
  const Track& track = walk.track;
  const int64_t pixel = track.pixel(p, q0 + t);
  const int64_t image = (int64_t{track.m} * p.batch + track.b) * p.tokens + pixel;
  const int64_t source = (int64_t{p.source(track.m)} * p.batch + track.b) * p.tokens + pixel;
  const int64_t own = (image * p.paths + track.k) * row, from = (source * p.paths + track.k) * row + p.rank;
  if (!p.half && part.first_bc && part.last_bc && p.padded_states == p.states && p.rank % 2 == 0) {
    float* const to = p.dproj_sum + from;
#pragma unroll 1
    for (int j = lane * 2; j < 2 * p.states; j += p.copy_lanes * 2) {
      float2 sum = make_float2(0.f, 0.f);
      for (int w = 0; w < warps; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(sums + w * kTile * p.pitch + j);
        sum.x += v.x;
        sum.y += v.y;
      }
      *reinterpret_cast<float2*>(to + j) = sum;
    }
  } else {
#pragma unroll 1
    for (int j = lane; j < 2 * p.states; j += p.copy_lanes) {
      const int column = j < p.states ? j : p.padded_states + j - p.states;
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += sums[w * kTile * p.pitch + column];
      add_to_dproj(p, from + j, sum, part.first_bc, part.last_bc);
      if (part.zero_own_bc) store_as(p.dproj, own + p.rank + j, 0.f, p);
    }
  }
#pragma unroll 1
  for (int r = lane; r < p.rank; r += p.copy_lanes) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += sums[w * kTile * p.pitch + 2 * p.padded_states + r];
    add_to_dproj(p, own + r, sum, part.first_low, part.last_low);
  }
}

// dx of one token and the thread's channels, of which `exist` exist; `to` counts elements of dx.
template <int CH>
__device__ inline void write_dx(const BackwardParams& p, const Contribution& part, int64_t to, int exist,
                                const float (&dx)[CH]) {
  if (CH == 2 && p.channels % 2 == 0 && !p.half) {
    if (exist < CH) return;
    if (part.first_dx) {
      write_floats<CH>(p.dx_sum + to, dx);
    } else {
      add_at<CH>(p.dx_sum + to, dx);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    if (c >= exist) break;
    if (p.half && part.last_dx) {
      store_as(p.dx, to + c, part.first_dx ? dx[c] : __ldcg(p.dx_sum + to + c) + dx[c], p);
    } else if (part.first_dx) {
      p.dx_sum[to + c] = dx[c];
    } else {
      const float one[1] = {dx[c]};
      add_at<1>(p.dx_sum + to + c, one);
    }
  }
}

// After a tile, the thread's share of its tokens: dx to memory, the low-rank part summed over the warp's channels, and
// the sums over tokens of the parameter gradients.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ inline void finish_tokens(const BackwardParams& p, const Seat& seat, const Walk& walk, const Tile& tile,
                                     const Contribution& part, int q0,
                                     ParameterGradients<NS, CH, kSharedDecay>& grads) {
  constexpr int kShare = kTile / (kLanes > 0 ? kLanes : 1);  // at most
  const int lanes = kLanes > 0 ? kLanes : p.state_lanes, lane_id = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* const sums = reinterpret_cast<const float*>(seat.shared + p.sums_at) + seat.c * 2;
  const float* const slopes = reinterpret_cast<const float*>(seat.shared + p.slope_at) + seat.c;
  const float* const channels = reinterpret_cast<const float*>(seat.shared + p.channels_at) + seat.c;
  const int first = opaque(seat.lane);
  float draw[kShare][CH] = {};
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int t = first + i * lanes;
    if (t >= kTile) break;
    const int at = t * p.single;
    float sum[2 * CH], x[CH], dy[CH], slope[CH], token[2 * CH], dx[CH], skip[CH];
    read_floats<2 * CH>(sums + t * p.twin, sum);
    read_floats<2 * CH>(tile.tokens + t * p.twin + seat.c * 2, token);
    read_floats<CH>(tile.x + at + seat.c, x);
    read_floats<CH>(tile.dy + at + seat.c, dy);
    read_floats<CH>(slopes + at, slope);
    read_floats<CH>(channels + kSkipRow * p.block_channels, skip);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      // sum: d step through the decay, and dh * B (zoh: d step in full, and dx)
      const float dstep = kZoh ? sum[c] : fmaf(x[c], sum[CH + c], sum[c] * kLn2);
      draw[i][c] = dstep * slope[c];
      dx[c] = fmaf(skip[c], dy[c], kZoh ? sum[CH + c] : token[c] * sum[CH + c]);
      grads.bias[c] += draw[i][c];
      grads.skip[c] = fmaf(dy[c], x[c], grads.skip[c]);
    }
    if (q0 + t < walk.end) {
      const Track& track = walk.track;
      const int64_t pixel = (int64_t{track.m} * p.batch + track.b) * p.tokens + track.pixel(p, q0 + t);
      const int d = track.first_d + seat.c;
      write_dx<CH>(p, part, (p.x_per_path ? pixel * p.paths + track.k : pixel) * p.channels + d, p.channels - d, dx);
      if (p.ddelta != nullptr) {
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (d + c < p.channels) store_as(p.ddelta, (pixel * p.paths + track.k) * p.channels + d + c, draw[i][c], p);
      }
    }
  }
  float* const warp_sums =
      reinterpret_cast<float*>(seat.shared + p.warp_sums_at) + warp * kTile * p.pitch + 2 * p.padded_states;
  float* const dweight = reinterpret_cast<float*>(seat.shared + p.dweight_at) + threadIdx.x * CH;
#pragma unroll 1
  for (int r = 0; r < p.rank; ++r) {
    float w[CH], dw[CH], low[kShare] = {};
    read_floats<CH>(channels + (kWeightRows + r) * p.block_channels, w);
    read_floats<CH>(dweight + r * blockDim.x * CH, dw);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int t = first + i * lanes;
      if (t >= kTile) break;
      const float value = tile.rows[t * p.pitch + 2 * p.padded_states + r];
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        low[i] = fmaf(draw[i][c], w[c], low[i]);
        dw[c] = fmaf(draw[i][c], value, dw[c]);
      }
    }
    write_floats<CH>(dweight + r * blockDim.x * CH, dw);
    const int base = sum_over_lanes<kLanes, 32 * (kLanes > 0)>(low, lanes, 32, lane_id);
    const int held = max(1, kShare * lanes / 32);
#pragma unroll
    for (int v = 0; v < kShare; ++v) {
      const int t = first + (base + v) * lanes;
      if (v < held && lane_id < kShare * lanes && t < kTile) warp_sums[t * p.pitch + r] = low[v];
    }
  }
}

// Phase 3: one chunk of one path, against the scan. g is the gradient that the chunk scanned next hands over.
// kLanes: state_lanes where known at compile time, else 0.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ void walk_back(const BackwardParams& p, const Seat& seat, const Track& track, int chunk,
                          const Contribution& part, float (&g)[CH][NS]) {
  const int begin = chunk * p.chunk, end = min(begin + p.chunk, p.tokens);
  const Walk& walk = begin_walk(p, seat, track, end);
  const int d = track.first_d + seat.c;
  const int lane_id = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = kLanes > 0 ? kLanes : p.state_lanes;
  constexpr int kDecays = kSharedDecay ? 1 : NS;
  float a[CH][kDecays];
  load_decays<NS, CH, kSharedDecay>(p, track, d, seat.lane, a);
  ParameterGradients<NS, CH, kSharedDecay> grads = {};
  float* const dweight = reinterpret_cast<float*>(seat.shared + p.dweight_at);
  for (int i = 0; i < p.rank * CH; ++i) dweight[i * blockDim.x + threadIdx.x] = 0.f;
  float* const history = reinterpret_cast<float*>(seat.shared + p.history_at);  // [tile, CH, NS / V, thread, V]
  constexpr int V = NS % 4 == 0 ? 4 : 1;
  auto history_at = [&](int tile, int c, int j) {
    return history + (((tile * CH + c) * (NS / V) + j / V) * blockDim.x + threadIdx.x) * V;
  };
  float* const warp_sums = reinterpret_cast<float*>(seat.shared + p.warp_sums_at) + warp * kTile * p.pitch;
  float* const sums = reinterpret_cast<float*>(seat.shared + p.sums_at);

  const int pieces = (end - begin + int{kCheckpoint} - 1) / int{kCheckpoint};
  const int64_t plane = int64_t{p.states} * p.channels;
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    const int piece_begin = begin + (track.reversed ? piece : pieces - 1 - piece) * int{kCheckpoint};
    const int tiles = (min(piece_begin + int{kCheckpoint}, end) - piece_begin + kTile - 1) / kTile;
    auto first_token = [&](int tile) { return piece_begin + (track.reversed ? tiles - 1 - tile : tile) * kTile; };
    __syncthreads();  // the buffers of the piece before are free
    if (tiles > 1) {
      issue_tile<Reads::b_x>(p, seat, walk, first_token(0), 0);
    } else {
      issue_tile<Reads::all>(p, seat, walk, first_token(0), 0);
    }
    float h[CH][NS] = {};
    load_state<NS, CH>(p, p.saved_states + (track.mbk(p) * p.pieces() + piece_begin / int{kCheckpoint}) * plane, d,
                       seat.lane, h);
    // Along the scan: the state at the entry of every tile.
#pragma unroll 1
    for (int i = 0; i < tiles - 1; ++i) {
#pragma unroll
      for (int c = 0; c < CH; ++c)
#pragma unroll
        for (int j = 0; j < NS; j += V) {
          float part_of[V];
#pragma unroll
          for (int v = 0; v < V; ++v) part_of[v] = h[c][j + v];
          write_floats<V>(history_at(i, c, j), part_of);
        }
      const Tile tile = prepare_tile<Reads::b_x, kZoh, CH>(p, seat, walk, first_token(i), i & 1, [&] {
        if (i + 2 < tiles) {
          issue_tile<Reads::b_x>(p, seat, walk, first_token(i + 1), ~i & 1);
        } else {
          issue_tile<Reads::all>(p, seat, walk, first_token(i + 1), ~i & 1);
        }
      });
#pragma unroll 2
      for (int j = 0; j < kTile; ++j)
        advance<NS, CH, kSharedDecay, kZoh>(p, tile, seat, a, track.reversed ? kTile - 1 - j : j, h);
    }
    // Against it: tile by tile.
#pragma unroll 1
    for (int i = tiles - 1; i >= 0; --i) {
      const int q0 = first_token(i);
      const Tile tile = prepare_tile<Reads::all, kZoh, CH>(p, seat, walk, q0, i & 1, [&] {
        if (i > 0) issue_tile<Reads::all>(p, seat, walk, first_token(i - 1), ~i & 1);
      });
      if (i < tiles - 1) {
#pragma unroll
        for (int c = 0; c < CH; ++c)
#pragma unroll
          for (int j = 0; j < NS; j += V) {
            float part_of[V];
            read_floats<V>(history_at(i, c, j), part_of);
#pragma unroll
            for (int v = 0; v < V; ++v) h[c][j + v] = part_of[v];
          }
      }
      float state[kTile][CH][NS];  // before each token
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int t = opaque(track.reversed ? kTile - 1 - j : j);
#pragma unroll
        for (int c = 0; c < CH; ++c)
#pragma unroll
          for (int n = 0; n < NS; ++n) state[j][c][n] = h[c][n];
        advance<NS, CH, kSharedDecay, kZoh>(p, tile, seat, a, t, h);
        float dy[CH], dc[NS];
        read_floats<CH>(tile.dy + t * p.single + seat.c, dy);
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          dc[n] = dy[0] * h[0][n];
#pragma unroll
          for (int c = 1; c < CH; ++c) dc[n] = fmaf(dy[c], h[c][n], dc[n]);
        }
        const int base = sum_over_lanes<kLanes, 32 * (kLanes > 0)>(dc, lanes, 32, lane_id);
        const int held = max(1, NS * lanes / 32);
#pragma unroll
        for (int v = 0; v < NS; ++v)
          if (v < held && lane_id < NS * lanes)
            warp_sums[t * p.pitch + p.padded_states + seat.lane * NS + base + v] = dc[v];
      }
#pragma unroll
      for (int j = kTile - 1; j >= 0; --j) {
        const int t = opaque(track.reversed ? kTile - 1 - j : j);
        const float* row = tile.rows + t * p.pitch + seat.lane * NS;
        float token[2 * CH], dy[CH], b[NS], c_row[NS], db[NS] = {};
        float sum[2 * CH] = {};  // over the thread's states: d step and dh * B (zoh: dx)
        read_floats<2 * CH>(tile.tokens + t * p.twin + seat.c * 2, token);
        read_floats<CH>(tile.dy + t * p.single + seat.c, dy);
        read_floats<NS>(row, b);
        read_floats<NS>(row + p.padded_states, c_row);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const float shared_decay = kSharedDecay ? exp2_fast(token[c] * a[c][0]) : 0.f;
#pragma unroll
          for (int n = 0; n < NS; ++n) {
            const float a_n = a[c][kSharedDecay ? 0 : n];
            const float e = kSharedDecay ? shared_decay : exp2_fast(token[c] * a_n);
            const float dh = fmaf(c_row[n], dy[c], g[c][n]);
            g[c][n] = e * dh;
            const float dz = g[c][n] * state[j][c][n];
            if constexpr (kZoh) {
              const float natural = a_n * kLn2, z = token[c] * natural;
              const float bbar = zoh_weight(token[c], z, e, natural), x = token[CH + c], dbbar = dh * b[n] * x;
              grads.a[c][kSharedDecay ? 0 : n] +=
                  fmaf(dbbar, zoh_weight_slope(token[c], z, e, bbar, natural), token[c] * dz);
              sum[c] += fmaf(dbbar, e, natural * dz);
              sum[CH + c] = fmaf(bbar, dh * b[n], sum[CH + c]);
              db[n] = fmaf(bbar * x, dh, db[n]);
            } else {
              float& da = grads.a[c][kSharedDecay ? 0 : n];
              da = fmaf(token[c], dz, da);
              sum[c] = fmaf(a_n, dz, sum[c]);
              sum[CH + c] = fmaf(b[n], dh, sum[CH + c]);
              db[n] = fmaf(token[CH + c], dh, db[n]);
            }
          }
        }
        const int base = sum_over_lanes<kLanes, 32 * (kLanes > 0)>(db, lanes, 32, lane_id);
        const int held = max(1, NS * lanes / 32);
#pragma unroll
        for (int v = 0; v < NS; ++v)
          if (v < held && lane_id < NS * lanes) warp_sums[t * p.pitch + seat.lane * NS + base + v] = db[v];
        const int sum_base = sum_over_lanes<1, kLanes>(sum, 1, lanes, lane_id);
        const int sum_held = max(1, 2 * CH / lanes);
#pragma unroll
        for (int v = 0; v < 2 * CH; ++v)
          if (v < sum_held && seat.lane < 2 * CH) sums[t * p.twin + seat.c * 2 + sum_base + v] = sum[v];
      }
      __syncwarp();
      finish_tokens<NS, CH, kLanes, kSharedDecay, kZoh>(p, seat, walk, tile, part, q0, grads);
      __syncthreads();
      write_dproj(p, seat, walk, part, q0);
    }
  }

  // This chunk's part of the parameter gradients.
  const int64_t parameters = int64_t{p.modalities} * p.paths * p.channels;
  const int64_t mkd = (int64_t{track.b} * p.chunks + chunk) * parameters + track.mk(p) * p.channels + d;
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const bool exists = d + c < p.channels;
    for (int off = 1; off < p.state_lanes; off *= 2) {
      if constexpr (kSharedDecay) grads.a[c][0] += __shfl_xor_sync(0xffffffffu, grads.a[c][0], off);
      grads.bias[c] += __shfl_xor_sync(0xffffffffu, grads.bias[c], off);
      grads.skip[c] += __shfl_xor_sync(0xffffffffu, grads.skip[c], off);
    }
    for (int r = 0; r < p.rank; ++r) {
      float dw = dweight[(r * blockDim.x + threadIdx.x) * CH + c];
      for (int off = 1; off < p.state_lanes; off *= 2) dw += __shfl_xor_sync(0xffffffffu, dw, off);
      if (exists && seat.lane == 0) p.ddt_weight[(mkd + c) * p.rank + r] = dw;
    }
    if (!exists) continue;
    if constexpr (kSharedDecay) {
      if (seat.lane == 0) p.da[mkd + c] = grads.a[c][0];
    } else {
#pragma unroll
      for (int j = 0; j < NS; ++j) {
        const int n = seat.lane * NS + j;
        if (n < p.states) p.da[(mkd + c) * p.states + n] = grads.a[c][j];
      }
    }
    if (seat.lane == 0) {
      if (p.ddt_bias != nullptr) p.ddt_bias[mkd + c] = grads.bias[c];
      if (p.dd != nullptr) p.dd[mkd + c] = grads.skip[c];
    }
  }
}

template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    ss2d_backward_kernel(const __grid_constant__ BackwardParams p) {
  extern __shared__ float4 shared_base[];
  const auto grid = cooperative_groups::this_grid();
  const int lanes = kLanes > 0 ? kLanes : p.state_lanes;
  const Seat seat = {static_cast<int>(threadIdx.x) % lanes, static_cast<int>(threadIdx.x) / lanes * CH,
                     static_cast<int>(threadIdx.x) % p.copy_lanes, static_cast<int>(threadIdx.x) / p.copy_lanes,
                     reinterpret_cast<char*>(shared_base)};
  const int64_t plane = int64_t{p.states} * p.channels;

  // Zeros where staged rows are padded: B and C of states that do not exist.
  for (int i = threadIdx.x; i < p.history_at / 4; i += blockDim.x) reinterpret_cast<float*>(shared_base)[i] = 0.f;
  __syncthreads();
  if (p.chunks > 1) {
    const int64_t tasks = int64_t{p.modalities} * p.batch * p.groups * p.paths * p.chunks;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
      const int chunk = static_cast<int>(task % p.chunks), path = static_cast<int>(task / p.chunks % p.paths);
      const int64_t sequence = task / p.chunks / p.paths;
      const Track track(p, sequence / p.groups, path, static_cast<int>(sequence % p.groups));
      const int begin = chunk * p.chunk, d = track.first_d + seat.c;
      float g[CH][NS] = {}, steps[CH] = {};
      summarize_chunk<NS, CH, kSharedDecay>(p, seat, track, begin, min(begin + p.chunk, p.tokens), g, steps);
      const int64_t at = track.mbk(p) * p.chunks + chunk;
      store_state<NS, CH>(p, p.chunk_state + at * plane, d, seat.lane, g);
      if (seat.lane == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (d + c < p.channels) p.chunk_steps[at * p.channels + d + c] = steps[c];
      }
    }
    grid.sync();
    prefix_chunks<kSharedDecay>(p, true, reinterpret_cast<float2*>(seat.shared + p.history_at));
    grid.sync();
  }
  const int images = p.shared_source ? p.batch : p.modalities * p.batch;
#pragma unroll 1
  for (int i = 0; i < p.paths; ++i) {
    if (i == p.row_paths && i > 0) grid.sync();
    for (int64_t task = blockIdx.x; task < int64_t{images} * p.chunks; task += gridDim.x) {
      const int image = static_cast<int>(task / p.chunks), chunk = static_cast<int>(task % p.chunks);
      const int first_m = p.shared_source ? 0 : image / p.batch, last_m = p.shared_source ? 1 : first_m;
      for (int m = first_m; m <= last_m; ++m) {
        for (int group = 0; group < p.groups; ++group) {
          const Track track(p, int64_t{m} * p.batch + image % p.batch, p.order[i], group);
          float g[CH][NS] = {};
          if (p.chunks > 1)
            load_state<NS, CH>(p, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane, track.first_d + seat.c,
                               seat.lane, g);
          const bool first_group = group == 0, last_group = group == p.groups - 1;
          const Contribution part = {first_group,
                                     last_group,
                                     first_group && m == first_m,
                                     last_group && m == last_m,
                                     first_group && p.shared_source && p.source(m) != m,
                                     i == 0 || p.x_per_path,
                                     i == p.paths - 1 || p.x_per_path};
          walk_back<NS, CH, kLanes, kSharedDecay, kZoh>(p, seat, track, chunk, part, g);
        }
      }
    }
  }
}

using BackwardKernel = void (*)(BackwardParams);

// Eight states of one channel only where 32 lanes of four do not suffice.
template <bool kSharedDecay, bool kZoh>
BackwardKernel kernel_with(const Layout& layout) {
  if (layout.states_per_thread == 8) return ss2d_backward_kernel<8, 1, 0, kSharedDecay, kZoh>;
  if constexpr (!kZoh) {
    if (layout.states_per_thread == 4 && layout.state_lanes == 4)
      return ss2d_backward_kernel<4, 2, 4, kSharedDecay, kZoh>;
  }
  if constexpr (!kZoh && !kSharedDecay) {
    if (layout.states_per_thread == 1) return ss2d_backward_kernel<1, 2, 1, kSharedDecay, kZoh>;
  }
  return ss2d_backward_kernel<4, 2, 0, kSharedDecay, kZoh>;
}
BackwardKernel kernel_of(const SS2DProblem& problem, const Layout& layout) {
  const bool zoh = problem.discretization == Discretization::zoh;
  if (has_shared_decay(problem)) return zoh ? kernel_with<true, true>(layout) : kernel_with<true, false>(layout);
  return zoh ? kernel_with<false, true>(layout) : kernel_with<false, false>(layout);
}

Layout layout_of(const SS2DProblem& problem) {
  const bool zoh = problem.discretization == Discretization::zoh;
  Layout layout;
  layout.states_per_thread = problem.states <= 1 && !zoh ? 1 : problem.states <= 128 ? 4 : 8;
  layout.channels_per_thread = layout.states_per_thread == 8 ? 1 : 2;
  layout.state_lanes = 1;
  while (layout.states_per_thread * layout.state_lanes < problem.states) layout.state_lanes *= 2;
  // Whole warps, blocks of channels of equal size.
  const int64_t threads = ceil_div(problem.channels, layout.channels_per_thread) * layout.state_lanes;
  const int64_t groups = ceil_div(threads, kMaxThreads);
  layout.threads = static_cast<int>(ceil_div(ceil_div(threads, groups), 32) * 32);
  layout.block_channels = layout.threads / layout.state_lanes * layout.channels_per_thread;
  layout.groups = static_cast<int>(ceil_div(problem.channels, layout.block_channels));
  layout.finish(problem);
  return layout;
}

// Shared memory of a block; its size goes to the layout.
void lay_out(const SS2DProblem& problem, Layout& layout, BackwardParams& params) {
  const int element = problem.dtype == DType::f32 ? 4 : 2, channels = layout.block_channels;
  params.single = channels + 8;
  params.twin = 2 * channels + 8;
  const int raw_bytes = 2 * kTile * params.single * element;
  SharedBytes shared;
  params.walk_at = shared.reserve(sizeof(Walk));
  params.rows_at = shared.reserve(2 * kTile * layout.pitch * element);
  params.decoded_rows_at = element == 2 ? shared.reserve(kTile * layout.pitch * 4) : 0;
  params.x_at = shared.reserve(raw_bytes);
  params.dy_at = shared.reserve(raw_bytes);
  params.decoded_at = element == 2 ? shared.reserve(2 * kTile * params.single * 4) : 0;
  params.delta_at = problem.rank == 0 ? shared.reserve(raw_bytes) : 0;
  params.token_at = shared.reserve(kTile * params.twin * 4);
  params.slope_at = shared.reserve(kTile * params.single * 4);
  params.sums_at = shared.reserve(kTile * params.twin * 4);
  params.channels_at = shared.reserve(staged_rows(static_cast<int>(problem.rank)) * channels * 4);
  params.dweight_at = shared.reserve(static_cast<int>(problem.rank) * layout.threads * layout.channels_per_thread * 4);
  params.warp_sums_at = shared.reserve(layout.threads / 32 * kTile * layout.pitch * 4);
  params.history_at = shared.reserve(
      std::max((kTilesPerPiece - 1) * layout.states_per_thread * layout.channels_per_thread * 4, 8) * layout.threads);
  params.copy_lanes = layout.threads / kTile;
  layout.shared_bytes = static_cast<size_t>(shared.count);
}

bool shares_source(const SS2DProblem& problem) {
  return problem.exchange == Exchange::from_visible || problem.exchange == Exchange::from_infrared;
}

Plan plan_of(const SS2DProblem& problem, BackwardParams& params) {
  Layout layout = layout_of(problem);
  lay_out(problem, layout, params);
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel_of(problem, layout)), layout);
  const int64_t images = (shares_source(problem) ? 1 : problem.modalities) * problem.batch;
  Plan plan = chunk_plan(problem, layout, images, resident, kCheckpoint);
  plan.grid = std::max<int64_t>(
      1, std::min<int64_t>(resident, plan.tasks * (plan.chunks > 1 ? problem.paths * layout.groups : 1)));
  if (problem.dtype != DType::f32) {
    const int64_t tokens = problem.modalities * problem.batch * problem.tokens();
    if (problem.paths > 1) plan.sum_at = plan.reserve(tokens * problem.channels);
    if (layout.groups > 1 || shares_source(problem))
      plan.dproj_sum_at = plan.reserve(tokens * problem.paths * (problem.rank + 2 * problem.states));
  }
  return plan;
}

}  // namespace

size_t ss2d_backward_workspace(const SS2DProblem& problem) {
  BackwardParams params{};
  return plan_of(problem, params).workspace_floats * sizeof(float);
}

int64_t ss2d_backward_parts(const SS2DProblem& problem) {
  BackwardParams params{};
  return problem.batch * plan_of(problem, params).chunks;
}

void ss2d_backward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DGradients& gradients,
                   void* workspace, void* stream) {
  BackwardParams params{};
  const Plan plan = plan_of(problem, params);
  float* floats = static_cast<float*>(workspace);
  const bool is_float = problem.dtype == DType::f32;
  fill_params(params, problem, inputs, plan, floats);
  const Strides contiguous = {problem.batch * problem.tokens() * problem.channels, problem.tokens() * problem.channels,
                              problem.width * problem.channels, problem.channels, 0};
  const int element = params.element();
  params.dy = activation(problem, gradients.dy, contiguous, element, "dy",
                         int64_t{plan.layout.block_channels} * element, problem.channels * element);
  params.saved_states = static_cast<const float*>(gradients.states);
  params.x_per_path = gradients.x_per_path;
  params.shared_source = shares_source(problem);
  params.dx = gradients.dx;
  params.dx_sum = is_float ? static_cast<float*>(gradients.dx) : floats + plan.sum_at;
  params.dproj = gradients.dproj;
  params.dproj_sum = is_float ? static_cast<float*>(gradients.dproj) : floats + plan.dproj_sum_at;
  params.ddelta = gradients.ddelta;
  params.ddt_weight = static_cast<float*>(gradients.ddt_weight);
  params.ddt_bias = static_cast<float*>(gradients.ddt_bias);
  params.da = static_cast<float*>(gradients.da);
  params.dd = static_cast<float*>(gradients.dd);
  int filled = 0;
  for (int axis = 0; axis < 2; ++axis) {
    for (int k = 0; k < problem.paths; ++k)
      if ((problem.path[k] & 1) == axis) params.order[filled++] = k;
    if (axis == 0) params.row_paths = filled;
  }
  launch_cooperative(kernel_of(problem, plan.layout), plan, params, stream);
}

}  // namespace cuda
}  // namespace diffmf
