// Backward pass of ss2d in one cooperative launch.
//
// With dh_l = C_l dy_l + decay_{l+1} dh_{l+1}, the gradient of the state runs against the scan, in the same three
// phases as the forward pass: (1) every chunk's contribution to what it hands to the chunk before, (2) a scan over the
// chunks, (3) the gradients. In phase 3 a block walks its chunk against the scan, piece by piece. The state that enters
// a piece was saved by the forward pass; the piece is scanned once to keep the state at each of its tiles in shared
// memory, then its tiles are taken in reverse: a tile's states and decays are rebuilt into registers, and the tile is
// walked backwards.
//
// Sums over channels (the gradients of B, C and of the low-rank part) are sums over the threads of a block: lanes by
// shuffles that halve the number of values at each step, warps through shared memory in a fixed order. A block
// therefore takes all blocks of channels of its chunk in turn. Where one modality's B and C serve both
// (Exchange::from_*), it takes both modalities too, so that every element of dproj has one writer and every run gives
// the same bits. dx is merged over paths as y is in the forward pass. Parameter gradients leave as one partial sum per
// (batch item, chunk).
#include <algorithm>

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 2;  // a multiprocessor holds: at most 128 registers a thread
constexpr int kTilesPerPiece = int{kCheckpoint} / kTile;

template <typename T>
struct BackwardParams : Params<T> {
  const T* dy;                // [M, B, L, D]
  const float* saved_states;  // [M, B, K, pieces, N, D]
  bool x_per_path;
  bool shared_source;  // Exchange::from_*: both modalities read one modality's B and C
  T* dx;               // [M, B, L, (K,) D]
  float* dx_sum;       // like dx while paths are still missing; dx itself when T is float
  T* dproj;            // [M, B, L, K, R + 2N]
  float* dproj_sum;    // like dproj while contributions are still missing; dproj itself when T is float
  T* ddelta;           // [M, B, L, K, D] or null
  float* ddt_weight;   // [parts, M, K, D, R]
  float* ddt_bias;     // [parts, M, K, D] or null
  float* da;           // [parts, M, K, D, N or 1]
  float* dd;           // [parts, M, K, D] or null
};

// What the recurrence needs of one token and channel.
struct Token {
  float step, x, dy, slope;  // slope = d step / d raw
};

template <typename T>
struct BackwardShared {
  TokenPlace* places;  // [kTile]
  Token* token;        // [kTile, block_channels]
  float* rows;         // [kTile, pitch]
  float2* grad;        // [kTile, block_channels]: d raw and dx
  float* weight;       // [R, block_channels]
  float* dweight;      // [R, block_channels]
  float* sums;         // [warps, kTile, 2 padded_states]: dB and dC of a warp's channels
  float* history;      // [kTilesPerPiece, NS, threads]: state at the entry of each tile
  __device__ BackwardShared(const Params<T>& p, float* base)
      : places(reinterpret_cast<TokenPlace*>(base)),
        token(reinterpret_cast<Token*>(base + kTile * sizeof(TokenPlace) / sizeof(float))),
        rows(reinterpret_cast<float*>(token + kTile * p.block_channels)),
        grad(reinterpret_cast<float2*>(rows + kTile * p.pitch)),
        weight(reinterpret_cast<float*>(grad + kTile * p.block_channels)),
        dweight(weight + p.rank * p.block_channels),
        sums(dweight + p.rank * p.block_channels),
        history(sums + blockDim.x / 32 * kTile * 2 * p.padded_states) {}
};

size_t shared_bytes_of(const Layout& layout, int64_t rank) {
  const size_t tokens = size_t(kTile) * layout.block_channels;
  return kTile * sizeof(TokenPlace) + tokens * (sizeof(Token) + sizeof(float2)) +
         sizeof(float) * (size_t(kTile) * layout.pitch + 2 * rank * layout.block_channels +
                          size_t(layout.threads) / 32 * kTile * 2 * layout.padded_states +
                          size_t(kTilesPerPiece) * layout.states_per_thread * layout.threads);
}

// Where this thread stands in a walk.
template <typename T>
struct Seat {
  int c, lane;        // in the recurrence: channel of the block, lane of the channel
  int slot, moved_c;  // where data moves
  int first_d;
  bool moves;  // moved_c is a real channel
  float bias;  // of moved_c
  __device__ Seat(const Params<T>& p, const Track<T>& track)
      : c(threadIdx.x / p.state_lanes),
        lane(threadIdx.x % p.state_lanes),
        slot(threadIdx.x / p.block_channels),
        moved_c(threadIdx.x % p.block_channels),
        first_d(track.group * p.block_channels),
        moves(first_d + moved_c < p.channels),
        bias(p.dt_bias != nullptr && moves ? p.dt_bias[track.mk(p) * p.channels + first_d + moved_c] : 0.f) {}
};

// Stages the tile of tokens [q0, q0 + kTile): rows, steps, x and dy. Between two barriers.
template <typename T>
__device__ void stage_tile(const BackwardParams<T>& p, const BackwardShared<T>& shared, const Track<T>& track,
                           const Seat<T>& seat, const Columns& columns, int q0, int end) {
  const int slot = recomputed(seat.slot), moved_c = recomputed(seat.moved_c);
  __syncthreads();  // the tile before is no longer needed
  place_tile(p, track, q0, end, shared.places);
  __syncthreads();
  RowRegs rows;
  fetch_rows(p, track, columns, shared.places, rows);
  const int64_t image = (int64_t{track.m} * p.batch + track.b) * p.tokens * p.channels + seat.first_d + moved_c;
#pragma unroll 2
  for (int t = slot; t < kTile; t += p.state_lanes) {
    const TokenPlace place = shared.places[t];
    const bool valid = seat.moves && place.valid;
    Token& token = shared.token[t * p.block_channels + moved_c];
    token.x = valid ? decode(track.x[place.x + moved_c], p.is_bf16) : 0.f;
    token.dy = valid ? decode(p.dy[image + place.pixel * p.channels], p.is_bf16) : 0.f;
  }
  store_rows(p, track, columns, shared.places, rows, shared.rows);
  __syncthreads();
#pragma unroll 2
  for (int t = slot; t < kTile; t += p.state_lanes) {
    const bool valid = shared.places[t].valid;
    float delta = 0.f;
    if (track.delta != nullptr && seat.moves && valid)
      delta = decode(track.delta[offset_of(p.delta_strides, pixel_of(p, track.axis, q0 + t)) + moved_c], p.is_bf16);
    const Step step = token_step(p, shared.rows + t * p.pitch, shared.weight, moved_c, seat.bias, delta);
    Token& token = shared.token[t * p.block_channels + moved_c];
    // A token past the end must leave state and gradients alone: step 0 means decay 1 and nothing added.
    token.step = valid ? step.value : 0.f;
    token.slope = step.slope;
  }
  __syncthreads();
}

// Decay and input weight of one token and state: h = decay * h + bbar * x * B. step2 = step * log2(e).
struct Advance {
  float decay, bbar;
};
template <bool kZoh>
__device__ inline Advance advance_of(float step, float step2, float a, float shared_decay, bool is_shared) {
  const float decay = is_shared ? shared_decay : exp2_fast(step2 * a);
  if constexpr (kZoh) return {decay, zoh_weight(step, step * a, decay, a)};
  return {decay, step};
}

// Phase 1: the gradient that a chunk hands to the chunk scanned before it, from a zero start, and its sum of steps.
template <typename T, int NS, bool kSharedDecay>
__device__ float summarize_chunk(const BackwardParams<T>& p, const BackwardShared<T>& shared, const Track<T>& track,
                                 int chunk, float (&g)[NS]) {
  const Seat<T> seat(p, track);
  constexpr int kDecays = kSharedDecay ? 1 : NS;
  float a2[kDecays];
  load_decays<NS, kSharedDecay>(p, track, seat.c, seat.lane, a2);
#pragma unroll
  for (int i = 0; i < kDecays; ++i) a2[i] *= kLog2e;
  __syncthreads();
  stage_weight(p, track, shared.weight);
  const int begin = chunk * p.chunk, end = min(begin + p.chunk, p.tokens);
  const int tiles = (end - begin + kTile - 1) / kTile;
  float step_sum = 0.f;
  for (int tile = 0; tile < tiles; ++tile) {
    const int q0 = begin + (track.reversed ? tile : tiles - 1 - tile) * kTile;
    stage_tile(p, shared, track, seat, columns_c(p), q0, end);
#pragma unroll 2
    for (int i = 0; i < kTile; ++i) {
      const int t = track.reversed ? i : kTile - 1 - i;
      const Token token = shared.token[t * p.block_channels + seat.c];
      float c[NS];
      read_states<NS>(shared.rows + t * p.pitch + p.padded_states + seat.lane * NS, c);
      float shared_decay = 0.f;
      if constexpr (kSharedDecay) shared_decay = exp2_fast(token.step * a2[0]);
#pragma unroll
      for (int j = 0; j < NS; ++j) {
        const float decay = kSharedDecay ? shared_decay : exp2_fast(token.step * a2[kSharedDecay ? 0 : j]);
        g[j] = decay * fmaf(c[j], token.dy, g[j]);
      }
      step_sum += token.step;
    }
  }
  return step_sum;
}

// Sums v over the lanes that differ in bit `first` of the lane number or a higher one. While a lane holds more than one
// value, each step also halves them: the lane whose bit is set keeps the upper half. Returns the index of v[0] among
// the values it started with; duplicates (more lanes than values) hold the same sums.
template <int NV>
__device__ inline int sum_over_lanes(float (&v)[NV], int first, int lane_id) {
  int off = first, base = 0;
#pragma unroll
  for (int count = NV / 2; count >= 1; count /= 2) {
    if (off < 32) {
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
  for (; off < 32; off *= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], off);
  return base;
}

// The gradients that a thread accumulates over a chunk.
template <int NS, bool kSharedDecay>
struct ParameterGradients {
  float a[kSharedDecay ? 1 : NS];  // recurrence role
  float bias, skip;                // data-moving role
};

// Which of the contributions to a row of dproj this walk is.
struct Contribution {
  bool first_low, last_low;  // to the low-rank part: one per block of channels
  bool first_bc, last_bc;    // to B and C: as many, times the modalities that read them
  bool zero_own_bc;          // nobody reads this modality's B and C
  bool first_dx, last_dx;    // to dx: one per path
};

// After a tile: dx and dproj of its tokens to memory, and the sums over tokens of the parameter gradients.
template <typename T, int NS, bool kSharedDecay>
__device__ void finish_tile(const BackwardParams<T>& p, const BackwardShared<T>& shared, const Track<T>& track,
                            const Seat<T>& seat, const Contribution& part,
                            ParameterGradients<NS, kSharedDecay>& grads) {
  const int64_t image = (int64_t{track.m} * p.batch + track.b) * p.tokens;
  const int64_t source_image = (int64_t{p.source(track.m)} * p.batch + track.b) * p.tokens;
  const int channels = p.block_channels, thread = recomputed(threadIdx.x);
  const int slot = recomputed(seat.slot), moved_c = recomputed(seat.moved_c);
#pragma unroll 1
  for (int t = slot; t < kTile; t += p.state_lanes) {
    const TokenPlace place = shared.places[t];
    if (!seat.moves || !place.valid) continue;
    const Token token = shared.token[t * channels + moved_c];
    const float2 grad = shared.grad[t * channels + moved_c];
    grads.bias += grad.x;
    grads.skip = fmaf(token.dy, token.x, grads.skip);
    const int64_t pixel = image + place.pixel, d = seat.first_d + moved_c;
    if (p.ddelta != nullptr) encode(grad.x, p.is_bf16, p.ddelta + (pixel * p.paths + track.k) * p.channels + d);
    const int64_t to = (p.x_per_path ? pixel * p.paths + track.k : pixel) * p.channels + d;
    const float dx = part.first_dx ? grad.y : p.dx_sum[to] + grad.y;
    if (part.last_dx) {
      encode(dx, p.is_bf16, p.dx + to);
    } else {
      p.dx_sum[to] = dx;
    }
  }
  auto add_to_dproj = [&](int64_t to, float v, bool first, bool last) {
    if (!first) v += p.dproj_sum[to];
    if (last) {
      encode(v, p.is_bf16, p.dproj + to);
    } else {
      p.dproj_sum[to] = v;
    }
  };
  const int row = p.row(), warps = blockDim.x / 32, columns = 2 * p.padded_states;
  for (int i = thread; i < kTile * 2 * p.states; i += blockDim.x) {
    const int t = i / (2 * p.states), j = i % (2 * p.states);
    const TokenPlace place = shared.places[t];
    if (!place.valid) continue;
    const int column = j < p.states ? j : p.padded_states + j - p.states;
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += shared.sums[(w * kTile + t) * columns + column];
    add_to_dproj(((source_image + place.pixel) * p.paths + track.k) * row + p.rank + j, sum, part.first_bc,
                 part.last_bc);
    if (part.zero_own_bc)
      encode(0.f, p.is_bf16, p.dproj + ((image + place.pixel) * p.paths + track.k) * row + p.rank + j);
  }
  // d low rank: one warp per (token, r) adds over the channels.
  for (int i = thread / 32; i < kTile * p.rank; i += warps) {
    const int t = i / p.rank, r = i % p.rank, lane = thread % 32;
    float sum = 0.f;
    for (int c = lane; c < channels; c += 32)
      sum = fmaf(shared.grad[t * channels + c].x, shared.weight[r * channels + c], sum);
    for (int off = 16; off > 0; off /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, off);
    const TokenPlace place = shared.places[t];
    if (lane == 0 && place.valid)
      add_to_dproj(((image + place.pixel) * p.paths + track.k) * row + r, sum, part.first_low, part.last_low);
  }
  for (int r = slot; r < p.rank; r += p.state_lanes) {
    float sum = shared.dweight[r * channels + moved_c];
    for (int t = 0; t < kTile; ++t)
      sum = fmaf(shared.grad[t * channels + moved_c].x, shared.rows[t * p.pitch + 2 * p.padded_states + r], sum);
    shared.dweight[r * channels + moved_c] = sum;
  }
}

// Phase 3: one chunk of one path, against the scan. g is the gradient that the chunk scanned next hands over.
template <typename T, int NS, bool kSharedDecay, bool kZoh>
__device__ void walk_back(const BackwardParams<T>& p, const BackwardShared<T>& shared, const Track<T>& track, int chunk,
                          const Contribution& part, float (&g)[NS]) {
  const Seat<T> seat(p, track);
  const int channels = p.block_channels, lane_id = threadIdx.x % 32;
  constexpr int kDecays = kSharedDecay ? 1 : NS;
  float a[kDecays];
  load_decays<NS, kSharedDecay>(p, track, seat.c, seat.lane, a);
  const bool owns = seat.first_d + seat.c < p.channels;
  const float skip = p.d != nullptr && owns ? p.d[track.mk(p) * p.channels + seat.first_d + seat.c] : 0.f;
  ParameterGradients<NS, kSharedDecay> grads = {};
  __syncthreads();
  stage_weight(p, track, shared.weight);
  for (int i = threadIdx.x; i < p.rank * channels; i += blockDim.x) shared.dweight[i] = 0.f;

  const int begin = chunk * p.chunk, end = min(begin + p.chunk, p.tokens);
  const int pieces = (end - begin + int{kCheckpoint} - 1) / int{kCheckpoint};
  const int64_t plane = int64_t{p.states} * p.channels;
  for (int piece = 0; piece < pieces; ++piece) {
    const int piece_begin = begin + (track.reversed ? piece : pieces - 1 - piece) * int{kCheckpoint};
    const int tiles = (min(piece_begin + int{kCheckpoint}, end) - piece_begin + kTile - 1) / kTile;
    float h[NS] = {};
    if (owns) {
      const int64_t saved = track.mbk(p) * p.pieces() + piece_begin / int{kCheckpoint};
      load_state<NS>(p, p.saved_states + saved * plane + seat.first_d + seat.c, seat.lane, h);
    }
    // Along the scan: the state at the entry of every tile.
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int j = 0; j < NS; ++j) shared.history[(tile * NS + j) * blockDim.x + threadIdx.x] = h[j];
      if (tile == tiles - 1) break;
      const int q0 = piece_begin + (track.reversed ? tiles - 1 - tile : tile) * kTile;
      stage_tile(p, shared, track, seat, columns_b(p), q0, end);
#pragma unroll 2
      for (int i = 0; i < kTile; ++i) {
        const int t = track.reversed ? kTile - 1 - i : i;
        const Token token = shared.token[t * channels + seat.c];
        float b[NS];
        read_states<NS>(shared.rows + t * p.pitch + seat.lane * NS, b);
        float shared_decay = 0.f;
        const float step2 = token.step * kLog2e;
        if constexpr (kSharedDecay) shared_decay = exp2_fast(step2 * a[0]);
#pragma unroll
        for (int j = 0; j < NS; ++j) {
          const float a_j = a[kSharedDecay ? 0 : j];
          const Advance to = advance_of<kZoh>(token.step, step2, a_j, shared_decay, kSharedDecay);
          h[j] = fmaf(to.decay, h[j], to.bbar * token.x * b[j]);
        }
      }
    }
    // Against it: tile by tile.
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int q0 = piece_begin + (track.reversed ? tiles - 1 - tile : tile) * kTile;
      stage_tile(p, shared, track, seat, columns_bc(p), q0, end);
      float state[kTile + 1][NS];
#pragma unroll
      for (int j = 0; j < NS; ++j) state[0][j] = shared.history[(tile * NS + j) * blockDim.x + threadIdx.x];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int t = recomputed(track.reversed ? kTile - 1 - i : i);
        const Token token = shared.token[t * channels + seat.c];
        float b[NS];
        read_states<NS>(shared.rows + t * p.pitch + seat.lane * NS, b);
        const float step2 = token.step * kLog2e;
        const float shared_decay = kSharedDecay ? exp2_fast(step2 * a[0]) : 0.f;
#pragma unroll
        for (int j = 0; j < NS; ++j) {
          const float a_j = a[kSharedDecay ? 0 : j];
          const Advance to = advance_of<kZoh>(token.step, step2, a_j, shared_decay, kSharedDecay);
          state[i + 1][j] = fmaf(to.decay, state[i][j], to.bbar * token.x * b[j]);
        }
      }
      // Per token: d step through the decay and the input weight ([0]), and dx ([1]), of this thread's states.
      float token_sums[2 * kTile];
#pragma unroll
      for (int i = kTile - 1; i >= 0; --i) {
        const int t = recomputed(track.reversed ? kTile - 1 - i : i);
        const Token token = shared.token[t * channels + seat.c];
        const float* row = shared.rows + t * p.pitch + seat.lane * NS;
        float b[NS], c[NS], products[2 * NS];  // dB then dC of the thread's states
        read_states<NS>(row, b);
        read_states<NS>(row + p.padded_states, c);
        float step_sum = 0.f, x_sum = 0.f;
        const float step2 = token.step * kLog2e;
        const float shared_decay = kSharedDecay ? exp2_fast(step2 * a[0]) : 0.f;
#pragma unroll
        for (int j = 0; j < NS; ++j) {
          const float a_j = a[kSharedDecay ? 0 : j], e = kSharedDecay ? shared_decay : exp2_fast(step2 * a_j);
          const float dh = fmaf(c[j], token.dy, g[j]);
          const float dz = dh * e * state[i][j];
          float bbar = token.step, da = token.step * dz;
          step_sum = fmaf(a_j, dz, step_sum);
          const float db = dh * b[j];
          if constexpr (kZoh) {
            const float z = token.step * a_j, dbbar = db * token.x;
            bbar = zoh_weight(token.step, z, e, a_j);
            da = fmaf(dbbar, zoh_weight_slope(token.step, z, e, bbar, a_j), da);
            step_sum = fmaf(dbbar, e, step_sum);
          } else {
            step_sum = fmaf(token.x, db, step_sum);
          }
          x_sum = fmaf(bbar, db, x_sum);
          grads.a[kSharedDecay ? 0 : j] += da;
          products[j] = bbar * token.x * dh;
          products[NS + j] = token.dy * state[i + 1][j];
          g[j] = e * dh;
        }
        token_sums[2 * i] = step_sum;
        token_sums[2 * i + 1] = x_sum;
        // Over the warp's channels: lanes a multiple of state_lanes apart.
        const int base = sum_over_lanes(products, p.state_lanes, lane_id);
        const int held = max(1, 2 * NS * p.state_lanes / 32);
        const bool duplicate = lane_id >= 2 * NS * p.state_lanes;
#pragma unroll
        for (int v = 0; v < 2 * NS; ++v) {
          if (v < held && !duplicate) {
            const int index = base + v, n = seat.lane * NS + index % NS;
            shared
                .sums[((threadIdx.x / 32) * kTile + t) * 2 * p.padded_states + (index < NS ? n : p.padded_states + n)] =
                products[v];
          }
        }
      }
      // Over the lanes of a channel, splitting the tokens among them.
      int off = 1, first_token = 0, tokens_held = kTile;
#pragma unroll
      for (int count = kTile / 2; count >= 1; count /= 2) {
        if (off < p.state_lanes) {
          const bool upper = seat.lane & off;
#pragma unroll
          for (int v = 0; v < 2 * count; ++v) {
            const float sent = upper ? token_sums[v] : token_sums[v + 2 * count];
            const float kept = upper ? token_sums[v + 2 * count] : token_sums[v];
            token_sums[v] = kept + __shfl_xor_sync(0xffffffffu, sent, off);
          }
          first_token += upper ? count : 0;
          tokens_held = count;
          off *= 2;
        }
      }
      for (; off < p.state_lanes; off *= 2) {
        token_sums[0] += __shfl_xor_sync(0xffffffffu, token_sums[0], off);
        token_sums[1] += __shfl_xor_sync(0xffffffffu, token_sums[1], off);
      }
#pragma unroll
      for (int v = 0; v < kTile; ++v) {
        if (v < tokens_held && seat.lane < kTile) {
          const int i = first_token + v, t = track.reversed ? kTile - 1 - i : i;
          const Token token = shared.token[t * channels + seat.c];
          shared.grad[t * channels + seat.c] =
              make_float2(token_sums[2 * v] * token.slope, fmaf(skip, token.dy, token_sums[2 * v + 1]));
        }
      }
      __syncthreads();
      finish_tile<T, NS, kSharedDecay>(p, shared, track, seat, part, grads);
    }
  }

  // This chunk's part of the parameter gradients.
  const int64_t parameters = int64_t{p.modalities} * p.paths * p.channels;
  const int64_t part_index = int64_t{track.b} * p.chunks + chunk;
  const int64_t mkd = part_index * parameters + track.mk(p) * p.channels + seat.first_d;
  if constexpr (kSharedDecay) {
    for (int off = 1; off < p.state_lanes; off *= 2) grads.a[0] += __shfl_xor_sync(0xffffffffu, grads.a[0], off);
    if (owns && seat.lane == 0) p.da[mkd + seat.c] = grads.a[0];
  } else if (owns) {
#pragma unroll
    for (int j = 0; j < NS; ++j) {
      const int n = seat.lane * NS + j;
      if (n < p.states) p.da[(mkd + seat.c) * p.states + n] = grads.a[j];
    }
  }
  // The tokens of a channel went through its first min(state_lanes, kTile) data-moving threads; shared.grad is free
  // again behind the barrier.
  __syncthreads();
  if (seat.slot < kTile) shared.grad[seat.slot * channels + seat.moved_c] = make_float2(grads.bias, grads.skip);
  __syncthreads();
  if (seat.slot == 0 && seat.moves) {
    float2 sum = make_float2(0.f, 0.f);
    for (int s = 0; s < min(p.state_lanes, kTile); ++s) {
      sum.x += shared.grad[s * channels + seat.moved_c].x;
      sum.y += shared.grad[s * channels + seat.moved_c].y;
    }
    if (p.ddt_bias != nullptr) p.ddt_bias[mkd + seat.moved_c] = sum.x;
    if (p.dd != nullptr) p.dd[mkd + seat.moved_c] = sum.y;
    for (int r = 0; r < p.rank; ++r)
      p.ddt_weight[(mkd + seat.moved_c) * p.rank + r] = shared.dweight[r * channels + seat.moved_c];
  }
}

template <typename T, int NS, bool kSharedDecay, bool kZoh>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    ss2d_backward_kernel(const __grid_constant__ BackwardParams<T> p) {
  extern __shared__ float4 shared_base[];
  const BackwardShared<T> shared(p, reinterpret_cast<float*>(shared_base));
  const auto grid = cooperative_groups::this_grid();
  const int c = threadIdx.x / p.state_lanes, lane = threadIdx.x % p.state_lanes;
  const int64_t plane = int64_t{p.states} * p.channels;

  clear_padding(p, shared.rows, kTile);
  if (p.chunks > 1) {
    const int64_t tasks = int64_t{p.modalities} * p.batch * p.groups * p.paths * p.chunks;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
      const Track<T> track = track_of(p, task / p.chunks / p.paths, static_cast<int>(task / p.chunks % p.paths));
      const int64_t chunk = track.mbk(p) * p.chunks + task % p.chunks;
      float g[NS] = {};
      const float steps = summarize_chunk<T, NS, kSharedDecay>(p, shared, track, static_cast<int>(task % p.chunks), g);
      const int d = track.group * p.block_channels + c;
      if (d < p.channels) {
        store_state<NS>(p, p.chunk_state + chunk * plane + d, lane, g);
        if (lane == 0) p.chunk_steps[chunk * p.channels + d] = steps;
      }
    }
    grid.sync();
    prefix_chunks(p, kSharedDecay, true);
    grid.sync();
  }
  const int images = p.shared_source ? p.batch : p.modalities * p.batch;
  for (int i = 0; i < p.paths; ++i) {
    if (i == p.row_paths && i > 0) grid.sync();
    for (int64_t task = blockIdx.x; task < int64_t{images} * p.chunks; task += gridDim.x) {
      const int image = static_cast<int>(task / p.chunks), chunk = static_cast<int>(task % p.chunks);
      const int first_m = p.shared_source ? 0 : image / p.batch, last_m = p.shared_source ? 1 : first_m;
      for (int m = first_m; m <= last_m; ++m) {
        for (int group = 0; group < p.groups; ++group) {
          const Track<T> track(p, m, image % p.batch, p.order[i], group);
          const int d = group * p.block_channels + c;
          float g[NS] = {};
          if (p.chunks > 1 && d < p.channels)
            load_state<NS>(p, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane + d, lane, g);
          const bool first_group = group == 0, last_group = group == p.groups - 1;
          const Contribution part = {first_group,
                                     last_group,
                                     first_group && m == first_m,
                                     last_group && m == last_m,
                                     first_group && p.shared_source && p.source(m) != m,
                                     i == 0 || p.x_per_path,
                                     i == p.paths - 1 || p.x_per_path};
          walk_back<T, NS, kSharedDecay, kZoh>(p, shared, track, chunk, part, g);
        }
      }
    }
  }
}

template <typename T>
using BackwardKernel = void (*)(BackwardParams<T>);

// Eight states a thread only where 32 lanes of four do not suffice: its tile does not fit the registers.
template <typename T>
BackwardKernel<T> kernel_of(const SS2DProblem& problem, int states_per_thread) {
  const bool zoh = problem.discretization == Discretization::zoh, shared = has_shared_decay(problem);
  switch (states_per_thread) {
    case 1:
      return ss2d_backward_kernel<T, 1, false, false>;
    case 4:
      if (zoh) return shared ? ss2d_backward_kernel<T, 4, true, true> : ss2d_backward_kernel<T, 4, false, true>;
      return shared ? ss2d_backward_kernel<T, 4, true, false> : ss2d_backward_kernel<T, 4, false, false>;
    default:
      if (zoh) return shared ? ss2d_backward_kernel<T, 8, true, true> : ss2d_backward_kernel<T, 8, false, true>;
      return shared ? ss2d_backward_kernel<T, 8, true, false> : ss2d_backward_kernel<T, 8, false, false>;
  }
}

bool shares_source(const SS2DProblem& problem) {
  return problem.exchange == Exchange::from_visible || problem.exchange == Exchange::from_infrared;
}

Plan plan_of(const SS2DProblem& problem) {
  Layout layout;
  const bool zoh = problem.discretization == Discretization::zoh;
  layout.states_per_thread = problem.states <= 1 && !zoh ? 1 : problem.states <= 128 ? 4 : 8;
  layout.lay_over(problem, kMaxThreads);
  layout.shared_bytes = shared_bytes_of(layout, problem.rank);
  const int resident = with_element(problem, [&](auto element) {
    using T = typename decltype(element)::type;
    return resident_blocks(reinterpret_cast<const void*>(kernel_of<T>(problem, layout.states_per_thread)), layout);
  });
  const int64_t images = (shares_source(problem) ? 1 : problem.modalities) * problem.batch;
  Plan plan = chunk_plan(problem, layout, images, resident);
  if (problem.dtype != DType::f32) {
    const int64_t tokens = problem.modalities * problem.batch * problem.tokens();
    if (problem.paths > 1) plan.sum_at = plan.reserve(tokens * problem.channels);
    if (layout.groups > 1 || shares_source(problem))
      plan.dproj_sum_at = plan.reserve(tokens * problem.paths * (problem.rank + 2 * problem.states));
  }
  return plan;
}

}  // namespace

size_t ss2d_backward_workspace(const SS2DProblem& problem) { return plan_of(problem).workspace_floats * sizeof(float); }

int64_t ss2d_backward_parts(const SS2DProblem& problem) { return problem.batch * plan_of(problem).chunks; }

void ss2d_backward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DGradients& gradients,
                   void* workspace, void* stream) {
  const Plan plan = plan_of(problem);
  with_element(problem, [&](auto element) {
    using T = typename decltype(element)::type;
    float* floats = static_cast<float*>(workspace);
    const bool is_float = problem.dtype == DType::f32;
    BackwardParams<T> params{};
    fill_params<T>(params, problem, inputs, plan, floats);
    params.dy = static_cast<const T*>(gradients.dy);
    params.saved_states = static_cast<const float*>(gradients.states);
    params.x_per_path = gradients.x_per_path;
    params.shared_source = shares_source(problem);
    params.dx = static_cast<T*>(gradients.dx);
    params.dx_sum = is_float ? static_cast<float*>(gradients.dx) : floats + plan.sum_at;
    params.dproj = static_cast<T*>(gradients.dproj);
    params.dproj_sum = is_float ? static_cast<float*>(gradients.dproj) : floats + plan.dproj_sum_at;
    params.ddelta = static_cast<T*>(gradients.ddelta);
    params.ddt_weight = static_cast<float*>(gradients.ddt_weight);
    params.ddt_bias = static_cast<float*>(gradients.ddt_bias);
    params.da = static_cast<float*>(gradients.da);
    params.dd = static_cast<float*>(gradients.dd);
    launch_cooperative(kernel_of<T>(problem, plan.layout.states_per_thread), plan, params, stream);
    return 0;
  });
}

}  // namespace cuda
}  // namespace diffmf
