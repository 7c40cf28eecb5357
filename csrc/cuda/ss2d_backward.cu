// Backward pass of ss2d in one cooperative launch.
//
// With dh_l = C_l dy_l + decay_{l+1} dh_{l+1}, the gradient of the state runs against the scan, in the same three
// phases as the forward pass: (1) every chunk's contribution to what it hands to the chunk before, (2) a scan over the
// chunks, (3) the gradients. In phase 3 a block walks its chunk against the scan, piece by piece. The state that enters
// a piece was saved by the forward pass; the piece is scanned once to keep the state at each of its tiles in shared
// memory, then its tiles are taken in reverse: a tile's states are rebuilt into registers, and the tile is walked
// backwards. A single state was saved at every tile, and pieces vanish.
//
// Sums over channels (the gradients of B, C and of the low-rank part) are sums over the threads of a block, always in
// the same order: over a warp's threads through shared memory a batch of tokens at a time, or by shuffles that halve
// the number of values at each step, and over the warps through shared memory. A block therefore takes all blocks of
// channels of its chunk in turn. Where one modality's B and C serve both (Exchange::from_*), it takes both modalities
// too, so that every element of dproj has one writer and every run gives the same bits. The paths of an axis follow one
// another in the block that owns the chunk, the column paths behind a grid barrier, so dx is summed in a fixed order
// too. Parameter gradients leave as one partial sum per (batch item, chunk); at the end the grid adds these up.
//
// Where that leaves too few tasks for the device, the blocks of channels of a chunk are split over several tasks, or
// the paths become tasks of their own, or both. Each split then writes to a copy of dproj of its own, and each path to
// a copy of dx, all of float; behind a grid barrier the copies are added in a fixed order.
#include <algorithm>

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kTile = 8;  // tokens staged at a time; divides what is between two saved states
// Blocks that a multiprocessor holds: at most 168 registers a thread, 128 with one state.
constexpr int min_blocks(int states_per_thread) { return states_per_thread == 1 ? 4 : 3; }
constexpr int kPiece = static_cast<int>(checkpoint_of(2)), kTilesPerPiece = kPiece / kTile;
static_assert(checkpoint_of(1) == kTile && kPiece % kTile == 0, "tiles must not straddle pieces");
constexpr int kWideTile = 16;  // tokens staged at a time in phase 1, which needs less memory for each
constexpr int kBatch = 4;      // tokens whose gradients of B or C are summed over a warp's channels at a time
static_assert(kTile % kBatch == 0, "a tile is made of batches");

// Where tiles are staged in shared memory, offsets in bytes: as copied, two tiles of float, one of a 16-bit type, which
// is free again once it has been decoded.
struct Stage {
  int pixels_at, rows_at, decoded_rows_at, x_at, dy_at, decoded_x_at, decoded_dy_at, delta_at, token_at;
};

struct BackwardParams : Params {
  Activation dy;              // [M, B, L, D]
  const float* saved_states;  // [M, B, K, pieces, N, D]
  bool x_per_path;
  bool shared_source;  // Exchange::from_*: both modalities read one modality's B and C
  void* dx;            // [M, B, L, (K,) D]
  float* dx_sum;       // like dx while paths are still missing, [K] copies if apart; else dx itself when it is float
  void* dproj;         // [M, B, L, K, R + 2N]
  float* dproj_sum;    // like dproj while contributions are still missing, [splits] copies; if one and float, dproj
  void* ddelta;        // [M, B, L, K, D] or null
  float* da;           // [M, K, D, N or 1]
  float* ddt_weight;   // [M, K, D, R]
  float* ddt_bias;     // [M, K, D] or null
  float* dd;           // [M, K, D] or null
  // What each chunk adds to the four, in this order, all of a (batch item, chunk) together: `part` floats, of which
  // `used` are not padding.
  float* parts;
  int64_t part, used, weights_at, bias_at, skip_at;
  int order[kMaxPaths];  // the paths sorted by axis: row paths first
  int row_paths;         // how many of them run along rows
  int images;            // (modality, batch item); batch items where a source is shared
  int splits, share;     // tasks that share the blocks of channels of a chunk; blocks of channels of each but the last
  int turns, walks;      // of one task, at most; of all tasks of a round
  int rounds;            // one for each path, or one for all
  bool dx_apart;         // each path writes to a copy of dx of its own
  int64_t dproj_copy, dx_copy;  // floats from copy to copy; zero where there is one
  bool paired;                  // rows of dproj can be written two values at a time
  FastDiv by_quads;             // columns of a row of sums, by four
  Stage narrow, wide;           // of tiles of phase 3 and of phase 1, in the same memory
  // The rest of shared memory, offsets in bytes.
  int walk_at, quads_at, channels_at, steps_at, channel_sums_at, warp_sums_at, scratch_at, history_at;
  // Values between tokens: of one value a channel, and of two. More than there are channels, so that the lanes of a
  // channel, at work on different tokens, find theirs in different banks.
  int single, twin;

  __device__ int low_pitch() const { return pitch - 2 * padded_states; }
};

constexpr int single_of(int channels) { return channels + 8; }
constexpr int twin_of(int channels) { return 2 * channels + 8; }
// The lanes of a channel, kLanes, are known at compile time but for zero-order hold and more than kDefaultStates states
// a thread: then kLanes is 0. Where a block has few channels these are constants too, so that the tokens of a tile are
// immediate offsets.
constexpr int kDefaultStates = 4;
constexpr int known_channels(int lanes) { return lanes >= 4 ? kMaxThreads / lanes * 2 : 0; }
// A lane keeps the sums of its tokens in registers.
constexpr bool owns_tokens(int lanes) { return lanes > 1; }
// The first of the tokens of a tile that are a lane's; kTile or more where it has none. Up to kBatch lanes take every
// kLanes-th token each; of more, those that share one token of each batch take one batch's each.
template <int kLanes>
__device__ inline int first_own_token(int lane) {
  if constexpr (kLanes <= kBatch) {
    return lane;
  } else {
    constexpr int kParts = kLanes / kBatch;
    return lane % kParts * kBatch + lane / kParts;
  }
}
// Of `tokens`, a lane's at most.
constexpr int share_of(int tokens, int lanes) { return lanes == 0 ? tokens : lanes < tokens ? tokens / lanes : 1; }
template <int kLanes>
struct Spacing {
  int single, twin, bc;  // bc: of the rows of B and C
  __device__ explicit Spacing(const BackwardParams& p)
      : single(known_channels(kLanes) > 0 ? single_of(known_channels(kLanes)) : p.single),
        twin(known_channels(kLanes) > 0 ? twin_of(known_channels(kLanes)) : p.twin),
        bc(kLanes > 0 ? 2 * kLanes * kDefaultStates : 2 * p.padded_states) {}
  // Slot t of a tile where its address shall not be hoisted out of a loop into registers.
  __device__ static int slot(int t) { return known_channels(kLanes) > 0 ? t : opaque(t); }
};

// What a walk reads of a token, and so stages.
enum class Reads { b_x, c_dy, all };
constexpr int tile_of(Reads reads) { return reads == Reads::c_dy ? kWideTile : kTile; }
template <Reads kReads>
__device__ inline const Stage& stage_of(const BackwardParams& p) {
  return kReads == Reads::c_dy ? p.wide : p.narrow;
}

// Rows of what is staged of the channels: an even number of dt_weight.
__host__ __device__ inline int channel_rows(int rank) { return kWeightRows + rank + rank % 2; }

// Where a thread stands: lane of the channel, first channel within the block of channels; and the block's memory.
struct Place {
  int lane, c;
  char* shared;
};

// One of the things that are copied of every token: contiguous bytes in memory and in shared memory.
struct alignas(16) Run {
  const char* from;  // at pixel 0
  int pixel;         // bytes from pixel to pixel
  int bytes, granule;
  int to, token_pitch, buffer_pitch;  // in shared memory
};
// In the order of a walk's runs, so that those a tile needs follow one another. kRows: B and C where they are copied as
// one, else B.
enum RunOf { kB, kX, kLow, kDy, kRows, kC, kRuns };  // kLow: the low-rank part or delta

// Where four columns of the warps' sums go: the first of them in dproj at pixel 0, and how many exist.
struct alignas(16) Quad {
  int64_t to;
  int count;
  bool first, last;  // contribution
};

// Which of the contributions to a row of dproj this walk is.
struct Contribution {
  // The last writes dproj; there is none where blocks of channels are split over tasks, and the first is each task's.
  bool first_low, last_low;  // to the low-rank part: one per block of channels
  bool first_bc, last_bc;    // to B and C: as many, times the modalities that read them
  bool zero_own_bc;          // nobody reads this modality's B and C
  bool first_dx, last_dx;    // to dx: one per path
};

// What a walk of one block along one path keeps at hand, in shared memory.
struct Walk {
  Run runs[kRuns];
  Track track;
  int chunk, begin, end, pieces;  // tokens [begin, end) of the axis
  Contribution part;
  int next;  // where the kernel's loop goes on: kept here, as registers are short
  // Elements, at pixel 0: of dx and ddelta the first channel of the block, of dproj the row of the walk's own low-rank
  // part and that of the B and C it reads; and from pixel to pixel.
  int64_t dx, ddelta, own_row, bc_row;
  int dx_pixel, ddelta_pixel, row_pixel;
  __device__ Walk(const BackwardParams& p, const Track& t, int chunk, const Contribution& part, const Stage& stage,
                  int tile)
      : track(t),
        chunk(chunk),
        begin(p.begin_of(chunk)),
        end(p.begin_of(chunk + 1)),
        pieces((end - begin + kPiece - 1) / kPiece),
        part(part),
        dx_pixel((p.x_per_path ? p.paths : 1) * p.channels),
        ddelta_pixel(p.paths * p.channels),
        row_pixel(p.paths * p.row()) {
    const Bases bases(p, t);
    const int element = p.element(), states = p.states * element, padded = p.padded_states * element;
    const int channels = min(p.block_channels, p.channels - t.first_d) * element, single = p.single * element;
    const int row_buffer = p.half ? 0 : tile * p.pitch * element, buffer = p.half ? 0 : tile * single;
    const char* const dy = p.dy.data + t.m * p.dy.modality + t.b * p.dy.batch + int64_t{t.first_d} * element;
    runs[kX] = {bases.x, p.x.pixel, channels, p.x.granule, stage.x_at, single, buffer};
    runs[kDy] = {dy, p.dy.pixel, channels, p.dy.granule, stage.dy_at, single, buffer};
    runs[kB] = {bases.bc, p.proj.pixel, states, p.proj.granule, stage.rows_at, 2 * padded, row_buffer};
    runs[kRows] = runs[kC] = runs[kB];
    if (p.pairs || states == padded) runs[kRows].bytes *= 2;
    if (p.pairs) {  // whichever is needed
      runs[kB] = runs[kC] = runs[kRows];
    } else {
      runs[kC].from += states;
      runs[kC].to += padded;
    }
    if (p.rank > 0) {
      runs[kLow] = {bases.low,
                    p.proj.pixel,
                    p.rank * element,
                    p.proj.granule,
                    stage.rows_at + tile * 2 * padded,
                    p.low_pitch() * element,
                    row_buffer};
    } else {
      runs[kLow] = {bases.delta, p.delta.pixel, channels, p.delta.granule, stage.delta_at, single, buffer};
    }
    const int64_t image = (int64_t{t.m} * p.batch + t.b) * p.tokens;
    const int64_t source = (int64_t{p.source(t.m)} * p.batch + t.b) * p.tokens;
    const int64_t dproj_copy = t.first_d / (p.share * p.block_channels) * p.dproj_copy;
    dx = image * dx_pixel + (p.x_per_path ? t.k * p.channels : t.k * p.dx_copy) + t.first_d;
    ddelta = image * ddelta_pixel + t.k * p.channels + t.first_d;
    own_row = dproj_copy + image * row_pixel + t.k * p.row();
    bc_row = dproj_copy + source * row_pixel + t.k * p.row() + p.rank;
  }
};
template <Reads kReads>
__device__ inline const Walk& begin_walk(const BackwardParams& p, const Place& place, const Track& track, int chunk,
                                         const Contribution& part) {
  Walk* const walk = reinterpret_cast<Walk*>(place.shared + p.walk_at);
  __syncthreads();  // nobody reads what the walk before needed
  stage_channels(p, track, reinterpret_cast<float*>(place.shared + p.channels_at), threadIdx.x, blockDim.x,
                 channel_rows(p.rank));
  if (threadIdx.x == 0) *walk = Walk(p, track, chunk, part, stage_of<kReads>(p), tile_of(kReads));
  copies_wait();
  __syncthreads();
  return *walk;
}

// One of `lanes` threads' share of a run; these loops run a few times only.
template <int kBytes>
__device__ inline void copy_some(uint32_t to, const char* from, int bytes, int lane, int lanes) {
#pragma unroll 1
  for (int i = lane * kBytes; i < bytes; i += lanes * kBytes) copy_async<kBytes>(to + i, from + i);
}

// Starts the copies of the tile of tokens [q0, q0 + kTokens) in the order of the scan, into buffer 0 or 1 (of
// float): each warp takes runs. Past the end: the last token once more, and its pixel is -1.
template <Reads kReads>
__device__ inline void issue_tile(const BackwardParams& p, const Place& place, const Walk& walk, int q0, int buffer) {
  constexpr int kTokens = tile_of(kReads), kLanes = 32 / kTokens;
  const int lane_id = opaque(threadIdx.x % 32), warp = threadIdx.x / 32;
  const int token = lane_id / kLanes, lane = lane_id % kLanes;
  const int q = q0 + (walk.track.reversed ? kTokens - 1 - token : token);
  const int pixel = walk.track.pixel(p, min(q, walk.end - 1));
  if (warp == 0)
    reinterpret_cast<int*>(place.shared + stage_of<kReads>(p).pixels_at)[buffer * kTokens + token] =
        q < walk.end ? pixel : -1;
#pragma unroll 1
  for (int i = warp; i < (kReads != Reads::all                     ? 3
                          : p.pairs || p.padded_states == p.states ? 4
                                                                   : 5);
       i += blockDim.x / 32) {
    const Run run = walk.runs[kReads == Reads::b_x ? kB + i : kReads == Reads::all ? kX + i : i < 2 ? kLow + i : kC];
    const char* const from = run.from + int64_t{pixel} * run.pixel;
    char* const to = place.shared + run.to + buffer * run.buffer_pitch + token * run.token_pitch;
    const uint32_t at = shared_address(to);
    if (run.granule == 16) {
      copy_some<16>(at, from, run.bytes, lane, kLanes);
    } else if (run.granule == 8) {
      copy_some<8>(at, from, run.bytes, lane, kLanes);
    } else if (run.granule == 4) {
      copy_some<4>(at, from, run.bytes, lane, kLanes);
    } else {  // 16-bit rows that start on odd elements: cp.async cannot
#pragma unroll 1
      for (int j = lane * 2; j < run.bytes; j += kLanes * 2)
        *reinterpret_cast<uint16_t*>(to + j) = *reinterpret_cast<const uint16_t*>(from + j);
    }
  }
  copies_commit();
}

// A staged tile, ready to be walked. Its slots hold the tokens in the order of the scan.
struct Tile {
  const float* rows;  // [kTile, {B, C}, padded_states]
  const float* low;   // [kTile, low_pitch]
  const float* x;     // [kTile, single]
  const float* dy;    // [kTile, single]
  float* tokens;      // [kTile, twin]: {step[CH], input[CH]} of CH channels each; input = step * x, or x for zoh
  const int* pixels;  // [kTile]: -1 past the end
};

// Computes the steps of a staged tile (a second copy of them for Reads::all) and makes float of its activations; every
// lane of a channel takes its share of the tokens.
template <Reads kReads, bool kZoh, bool kHalf, int CH, int kLanes>
__device__ inline void compute_steps(const BackwardParams& p, const Place& place, const Walk& walk, const Tile& tile,
                                     int q0, int buffer) {
  constexpr int kTokens = tile_of(kReads), kShare = share_of(kTokens, kLanes);
  const Stage& stage = stage_of<kReads>(p);
  const Spacing<kLanes> spacing(p);
  const int x_bytes = spacing.single * (kHalf ? 2 : 4), lanes = kLanes > 0 ? kLanes : p.state_lanes;
  const int raw = kHalf ? 0 : buffer * kTokens * x_bytes;
  const char* const raw_x = place.shared + stage.x_at + raw;
  const char* const raw_dy = place.shared + stage.dy_at + raw;
  const char* const raw_delta = place.shared + stage.delta_at + raw;
  const int first = opaque(place.lane);
  // Phase 1 needs no inputs.
  const int token_pitch = kReads == Reads::c_dy ? spacing.single : spacing.twin;
  float* const tokens = tile.tokens + first * token_pitch + (kReads == Reads::c_dy ? place.c : place.c * 2);
  float* const steps = reinterpret_cast<float*>(place.shared + p.steps_at) + first * spacing.single + place.c;
  float* const xs = const_cast<float*>(tile.x) + first * spacing.single + place.c;
  float* const dys = const_cast<float*>(tile.dy) + first * spacing.single + place.c;
  const float* const channels = reinterpret_cast<const float*>(place.shared + p.channels_at) + place.c;
  const float* const low = tile.low + first * p.low_pitch();
  float bias[CH];
  read_floats<CH>(channels + kBiasRow * p.block_channels, bias);
  // Tokens side by side: the weights are read once for them, and they hide each other's latency.
  constexpr int kSide = kLanes == 0 ? 1 : kShare < 4 ? kShare : 4;
#pragma unroll 1
  for (int i = 0; i < kShare; i += kSide) {
    if ((kLanes == 0 || kLanes > kTokens) && first + i * lanes >= kTokens) break;
    float step[kSide][CH];
    if (p.rank > 0) {
#pragma unroll
      for (int s = 0; s < kSide; ++s)
#pragma unroll
        for (int c = 0; c < CH; ++c) step[s][c] = bias[c];
      const float* weights = channels + kWeightRows * p.block_channels;
#pragma unroll 1
      for (int r = 0; r < p.rank; r += 2, weights += 2 * p.block_channels) {  // zeros follow an odd rank
        float w[2][CH];
        read_floats<CH>(weights, w[0]);
        read_floats<CH>(weights + p.block_channels, w[1]);
#pragma unroll
        for (int s = 0; s < kSide; ++s) {
          float pair[2];
          read_floats<2>(low + (i + s) * lanes * p.low_pitch() + r, pair);
#pragma unroll
          for (int c = 0; c < CH; ++c) step[s][c] = fmaf(pair[1], w[1][c], fmaf(pair[0], w[0][c], step[s][c]));
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSide; ++s) {
        read_activation<CH, kHalf>(p, raw_delta + (first + (i + s) * lanes) * x_bytes, place.c, step[s]);
#pragma unroll
        for (int c = 0; c < CH; ++c) step[s][c] += bias[c];
      }
    }
    if (p.softplus) {
#pragma unroll
      for (int s = 0; s < kSide; ++s)
#pragma unroll
        for (int c = 0; c < CH; ++c) step[s][c] = softplus(step[s][c]);
    }
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
      const int t = (i + s) * lanes;  // after the first
      if constexpr (kReads == Reads::c_dy) {
        write_floats<CH>(tokens + t * token_pitch, step[s]);
      } else {
        float token[2 * CH], x[CH];
        read_activation<CH, kHalf>(p, raw_x + (first + t) * x_bytes, place.c, x);
        if constexpr (kHalf) write_floats<CH>(xs + t * spacing.single, x);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          token[c] = step[s][c];
          token[CH + c] = kZoh ? x[c] : step[s][c] * x[c];
        }
        write_floats<2 * CH>(tokens + t * token_pitch, token);
      }
      if constexpr (kHalf && kReads != Reads::b_x) {
        float dy[CH];
        read_activation<CH, kHalf>(p, raw_dy + (first + t) * x_bytes, place.c, dy);
        write_floats<CH>(dys + t * spacing.single, dy);
      }
      if constexpr (kReads == Reads::all && kLanes == 0) write_floats<CH>(steps + t * spacing.single, step[s]);
    }
  }
  // A token past the end or a channel that does not exist must leave state and gradients alone: step 0 means decay 1,
  // and nothing is added.
  if (q0 + kTokens > walk.end || walk.track.first_d + p.block_channels > p.channels) {
#pragma unroll 1
    for (int t = 0; first + t < kTokens; t += lanes) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        if (tile.pixels[first + t] >= 0 && walk.track.first_d + place.c + c < p.channels) continue;
        tokens[t * token_pitch + c] = 0.f;
        if constexpr (kReads != Reads::c_dy) tokens[t * token_pitch + CH + c] = 0.f;
        if constexpr (kReads != Reads::c_dy) xs[t * spacing.single + c] = 0.f;
        if constexpr (kReads != Reads::b_x) dys[t * spacing.single + c] = 0.f;
        if constexpr (kReads == Reads::all && kLanes == 0) steps[t * spacing.single + c] = 0.f;
      }
    }
  }
}

// Waits for the tile in `buffer` and prepares it. Starts the next tile's copies by `issue_next()`.
template <Reads kReads, bool kZoh, int CH, int kLanes, typename F>
__device__ inline Tile prepare_tile(const BackwardParams& p, const Place& place, const Walk& walk, int q0, int buffer,
                                    F&& issue_next) {
  constexpr int kTokens = tile_of(kReads);
  const Stage& stage = stage_of<kReads>(p);
  const int single = Spacing<kLanes>(p).single;
  char* const shared = place.shared;
  auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };
  Tile tile;
  tile.tokens = floats(stage.token_at);
  tile.pixels = reinterpret_cast<const int*>(shared + stage.pixels_at) + buffer * kTokens;
  copies_wait();
  __syncthreads();  // the tile is there; nobody needs the one before
  if (p.half) {
    float* const rows = floats(stage.decoded_rows_at);
    const int bc_count = kTokens * 2 * p.padded_states, low_count = kTokens * p.pitch - bc_count;
    // Every warp decodes a low-rank part of its own: it needs it before the block's next barrier.
    float* const low = rows + bc_count + static_cast<int>(threadIdx.x / 32) * low_count;
    auto decode = [&](float* to, int first, int count, int thread, int threads) {
#pragma unroll 1
      for (int i = thread * 4; i < count; i += threads * 4)
        *reinterpret_cast<float4*>(to + i) = decode_quad(shared + stage.rows_at + (first + i) * 2, p.dtype);
    };
    decode(low, bc_count, low_count, threadIdx.x % 32, 32);
    if (p.pairs) {
#pragma unroll 1
      for (int t = threadIdx.x; t < kTokens; t += blockDim.x)
        decode_pair(shared + stage.rows_at + t * 2 * p.padded_states * 2, rows + t * 2 * p.padded_states, p.dtype);
    } else {
      decode(rows, 0, bc_count, threadIdx.x, blockDim.x);
    }
    __syncwarp();
    tile.rows = rows;
    tile.x = floats(stage.decoded_x_at);
    tile.dy = floats(stage.decoded_dy_at);
    tile.low = low;
    compute_steps<kReads, kZoh, true, CH, kLanes>(p, place, walk, tile, q0, buffer);
    __syncthreads();  // all is decoded
    issue_next();
  } else {
    issue_next();
    tile.rows = floats(stage.rows_at) + buffer * kTokens * p.pitch;
    tile.x = floats(stage.x_at) + buffer * kTokens * single;
    tile.dy = floats(stage.dy_at) + buffer * kTokens * single;
    tile.low = tile.rows + kTokens * 2 * p.padded_states;
    compute_steps<kReads, kZoh, false, CH, kLanes>(p, place, walk, tile, q0, buffer);
    __syncwarp();  // the lanes of a channel are in one warp
  }
  return tile;
}

template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ inline void advance(const BackwardParams& p, const Tile& tile, const Place& place,
                               const float (&a)[CH][kSharedDecay ? 1 : NS], int t, float (&h)[CH][NS]) {
  const Spacing<kLanes> spacing(p);
  float token[2 * CH], b[NS];
  read_floats<2 * CH>(tile.tokens + t * spacing.twin + place.c * 2, token);
  read_floats<NS>(tile.rows + t * spacing.bc + place.lane * NS, b);
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
template <int NS, int CH, int kLanes, bool kSharedDecay>
__device__ void summarize_chunk(const BackwardParams& p, const Place& place, const Track& track, int chunk,
                                float (&g)[CH][NS], float (&step_sum)[CH]) {
  const Walk& walk = begin_walk<Reads::c_dy>(p, place, track, chunk, Contribution{});
  float a[CH][kSharedDecay ? 1 : NS];
  load_decays<NS, CH, kSharedDecay>(p, track, track.first_d + place.c, place.lane, a);
  const Spacing<kLanes> spacing(p);
  const int begin = walk.begin, tiles = (walk.end - begin + kWideTile - 1) / kWideTile;
  auto first_token = [&](int tile) { return begin + (track.reversed ? tile : tiles - 1 - tile) * kWideTile; };
  issue_tile<Reads::c_dy>(p, place, walk, first_token(0), 0);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const Tile tile = prepare_tile<Reads::c_dy, false, CH, kLanes>(p, place, walk, first_token(i), i & 1, [&] {
      if (i + 1 < tiles) issue_tile<Reads::c_dy>(p, place, walk, first_token(i + 1), ~i & 1);
    });
#pragma unroll 4
    for (int t = kWideTile - 1; t >= 0; --t) {
      float token[CH], dy[CH], c_row[NS];
      read_floats<CH>(tile.tokens + t * spacing.single + place.c, token);
      read_floats<CH>(tile.dy + t * spacing.single + place.c, dy);
      read_floats<NS>(tile.rows + t * spacing.bc + spacing.bc / 2 + place.lane * NS, c_row);
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
  for (int level = 1; level <= 5; ++level) {
    const int count = NV >> level;
    if (count > 0 && off < last) {
      const bool upper = lane_id & off;
#pragma unroll
      for (int i = 0; i < NV / 2; ++i) {
        if (i >= count) break;
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

// Sums a batch of tokens' values of the states over the channels of a warp: `scratch` holds [kBatch, lane of the warp,
// NS] with kBatchPad values between tokens, the sums go to rows `to`, pitch apart.
constexpr int kBatchPad = 16;
template <int NS, int kLanes>
__device__ inline void sum_batch(const BackwardParams& p, const float* scratch, int lane_id, float* to) {
  static_assert(NS % 4 == 0 && (kLanes == 0 || NS == kDefaultStates), "pairs of states");
  __syncwarp();
  if constexpr (kLanes > kBatch) {  // a lane takes four states of a token at a time
#pragma unroll
    for (int i = 0; i < kLanes * kBatch / 32; ++i) {
      const int item = lane_id + 32 * i, t = item / kLanes, quad = item % kLanes;
      const float* from = scratch + t * (32 * NS + kBatchPad) + quad * 4;
      float sum[4];
      read_floats<4>(from, sum);
#pragma unroll
      for (int group = 1; group < 32 / kLanes; ++group) {
        float v[4];
        read_floats<4>(from + group * NS * kLanes, v);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] += v[n];
      }
      write_floats<4>(to + t * p.pitch + quad * 4, sum);
    }
  } else if constexpr (kLanes > 0) {  // a pair for each lane of the warp, or every kParts-th of a pair's terms
    constexpr int kParts = kBatch / kLanes, kPairs = NS * kLanes / 2;
    const int t = lane_id / (kParts * kPairs), part = lane_id / kPairs % kParts, pair = lane_id % kPairs;
    const float* from = scratch + t * (32 * NS + kBatchPad) + part * NS * kLanes + pair * 2;
    float2 sum = *reinterpret_cast<const float2*>(from);
#pragma unroll
    for (int i = kParts; i < 32 / kLanes; i += kParts) {
      const float2 v = *reinterpret_cast<const float2*>(from + i * NS * kLanes);
      sum.x += v.x;
      sum.y += v.y;
    }
#pragma unroll
    for (int off = 1; off < kParts; off *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, off * kPairs);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, off * kPairs);
    }
    if (part == 0) *reinterpret_cast<float2*>(to + t * p.pitch + pair * 2) = sum;
  } else {
    const int lanes = p.state_lanes, states = NS * lanes, pair_shift = p.lane_shift + (NS == 8 ? 2 : 1);
#pragma unroll 1
    for (int i = lane_id; i < kBatch * states / 2; i += 32) {
      const int t = i >> pair_shift, pair = i - (t << pair_shift);
      const float* from = scratch + t * (32 * NS + kBatchPad) + pair * 2;
      float2 sum = *reinterpret_cast<const float2*>(from);
#pragma unroll 1
      for (int group = 1; group < 32 / lanes; ++group) {
        const float2 v = *reinterpret_cast<const float2*>(from + group * states);
        sum.x += v.x;
        sum.y += v.y;
      }
      *reinterpret_cast<float2*>(to + t * p.pitch + pair * 2) = sum;
    }
  }
  __syncwarp();
}

// Two neighbouring elements of an output of type dtype, at an even element.
__device__ inline void store_pair(void* to, int64_t i, float2 v, const BackwardParams& p) {
  if (p.half) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + i) =
        encode(v.x, p.dtype) | static_cast<uint32_t>(encode(v.y, p.dtype)) << 16;
  } else {
    *reinterpret_cast<float2*>(static_cast<float*>(to) + i) = v;
  }
}

// at + pixel * stride, of numbers that are not negative: one instruction.
__device__ inline int64_t at_pixel(int64_t at, int pixel, int stride) {
  return at + static_cast<int64_t>(uint64_t{static_cast<uint32_t>(pixel)} * static_cast<uint32_t>(stride));
}

// The quads of a walk's rows of dproj.
__device__ inline void lay_out_quads(const BackwardParams& p, const Place& place, const Walk& walk) {
  const Contribution& part = walk.part;
  for (int i = threadIdx.x; i < static_cast<int>(p.by_quads.divisor); i += blockDim.x) {
    const int column = i * 4;
    const bool of_c = column >= p.padded_states, low = column >= 2 * p.padded_states;
    const int at = column - (low    ? 2 * p.padded_states
                             : of_c ? p.padded_states
                                    : 0);  // within B, C or the low-rank part
    Quad quad;
    quad.to = low ? walk.own_row + at : walk.bc_row + (of_c ? p.states + at : at);
    quad.count = min((low ? p.rank : p.states) - at, 4);
    quad.first = low ? part.first_low : part.first_bc;
    quad.last = low ? part.last_low : part.last_bc;
    reinterpret_cast<Quad*>(place.shared + p.quads_at)[i] = quad;
  }
}

// After a tile: the warps' sums become rows of dproj, four columns a thread. Between two barriers.
__device__ inline void write_dproj(const BackwardParams& p, const Place& place, const Walk& walk, const Tile& tile) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int quads = static_cast<int>(p.by_quads.divisor);
  const int row_pixel = walk.row_pixel;
#pragma unroll 1
  for (int i = opaque(threadIdx.x); i < kTile * quads; i += blockDim.x) {
    const int t = p.by_quads.quotient(i), column = i - t * quads, pixel = tile.pixels[t];
    if (pixel < 0) continue;
    const Quad quad = reinterpret_cast<const Quad*>(place.shared + p.quads_at)[column];
    const float* const sums = reinterpret_cast<const float*>(place.shared + p.warp_sums_at) + t * p.pitch + column * 4;
    float v[4];
    read_floats<4>(sums, v);
#pragma unroll
    for (int w = 1; w < kMaxThreads / 32; ++w) {
      if (w < warps) {
        const float4 more = *reinterpret_cast<const float4*>(sums + w * kTile * p.pitch);
        v[0] += more.x;
        v[1] += more.y;
        v[2] += more.z;
        v[3] += more.w;
      }
    }
    const int64_t to = at_pixel(quad.to, pixel, row_pixel);
    const bool rounds = p.half && quad.last;  // float rows end where they are summed
    if (p.paired) {
      if (!quad.first) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          if (j >= quad.count) break;
          const float2 before = __ldcg(reinterpret_cast<const float2*>(p.dproj_sum + to + j));
          v[j] += before.x;
          v[j + 1] += before.y;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (j >= quad.count) break;
        if (rounds) {
          store_pair(p.dproj, to + j, make_float2(v[j], v[j + 1]), p);
        } else {
          *reinterpret_cast<float2*>(p.dproj_sum + to + j) = make_float2(v[j], v[j + 1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= quad.count) break;
        const float sum = quad.first ? v[j] : v[j] + __ldcg(p.dproj_sum + to + j);
        if (rounds) {
          store_as(p.dproj, to + j, sum, p);
        } else {
          p.dproj_sum[to + j] = sum;
        }
      }
    }
  }
  if (walk.part.zero_own_bc) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * 2 * p.states; i += blockDim.x) {
      const int t = i / (2 * p.states), pixel = tile.pixels[t];
      if (pixel < 0) continue;
      const int64_t own = at_pixel(walk.own_row + p.rank + i - t * 2 * p.states, pixel, row_pixel);
      if (p.splits > 1) {
        p.dproj_sum[own] = 0.f;
      } else {
        store_as(p.dproj, own, 0.f, p);
      }
    }
  }
}

// What the paths before left in dx_sum of the thread's channels, of which `exist` exist.
template <int CH>
__device__ inline void read_dx(const BackwardParams& p, int64_t from, int exist, float (&dx)[CH]) {
  if (CH == 2 && p.channels % 2 == 0) {  // both channels or none
    if (exist < CH) return;
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(p.dx_sum + from));
    dx[0] = pair.x;
    dx[CH - 1] = pair.y;
  } else {
#pragma unroll
    for (int c = 0; c < CH; ++c)
      if (c < exist) dx[c] = __ldcg(p.dx_sum + from + c);
  }
}

// dx of the thread's tokens and CH channels, all of which exist. Where it leaves in a 16-bit type it comes with what
// read_dx found. `c` is the first channel within the block.
template <int CH, int kShare>
__device__ inline void write_dx(const BackwardParams& p, const Walk& walk, int c, const int (&pixel)[kShare],
                                const float (&dx)[kShare][CH]) {
  const int64_t at = walk.dx + c;
  const int stride = walk.dx_pixel;
  if (p.half && walk.part.last_dx) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (pixel[i] < 0) continue;
      if constexpr (CH == 2) {
        store_pair(p.dx, at_pixel(at, pixel[i], stride), make_float2(dx[i][0], dx[i][1]), p);
      } else {
        store_as(p.dx, at_pixel(at, pixel[i], stride), dx[i][0], p);
      }
    }
  } else if (walk.part.first_dx) {
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (pixel[i] >= 0) write_floats<CH>(p.dx_sum + at_pixel(at, pixel[i], stride), dx[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (pixel[i] >= 0) add_at<CH>(p.dx_sum + at_pixel(at, pixel[i], stride), dx[i]);
  }
}

// The derivative of softplus where it is `step`: 1 - e^-step, by its Taylor series where the difference would cancel.
__device__ inline float slope_of(float step) {
  float p = 1.f / 5040.f;
  p = fmaf(p, -step, 1.f / 720.f);
  p = fmaf(p, -step, 1.f / 120.f);
  p = fmaf(p, -step, 1.f / 24.f);
  p = fmaf(p, -step, 1.f / 6.f);
  p = fmaf(p, -step, 0.5f);
  p = fmaf(p, -step, 1.f);
  return step < 0.5f ? step * p : 1.f - exp2_fast(-step * kLog2e);
}

// The sums over the states of a token's channels, d step through the decay and dh * B (zoh: d step in full, and dx),
// become the gradients of the raw steps, and dx but for the skip. `step` holds the steps in front.
template <int CH, bool kZoh, int kCount>
__device__ inline void finish_sums(const BackwardParams& p, const float (&step)[kCount], const float (&x)[CH],
                                   float (&sum)[2 * CH]) {
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const float dstep = kZoh ? sum[c] : fmaf(x[c], sum[CH + c], sum[c] * kLn2);
    sum[c] = p.softplus ? dstep * slope_of(step[c]) : dstep;
    if constexpr (!kZoh) sum[CH + c] *= step[c];
  }
}

// Tokens of a tile whose sums a lane keeps.
constexpr int own_tokens(int lanes) { return owns_tokens(lanes) ? share_of(kTile, lanes) : 1; }

// After a tile, the thread's share of its tokens: dx to memory, the low-rank part summed over the warp's channels, and
// the sums over tokens of the parameter gradients.
template <int CH, int kLanes, bool kZoh>
__device__ inline void finish_tokens(const BackwardParams& p, const Place& place, const Walk& walk, const Tile& tile,
                                     const float (&own)[own_tokens(kLanes)][2 * CH]) {
  const Contribution part = walk.part;
  const Spacing<kLanes> spacing(p);
  constexpr int kShare = share_of(kTile, kLanes);
  constexpr bool kAllHave = kLanes > 0 && kLanes <= kTile;  // every lane has as many tokens
  const int lanes = kLanes > 0 ? kLanes : p.state_lanes, lane_id = opaque(threadIdx.x % 32), warp = threadIdx.x / 32;
  const float* const steps = reinterpret_cast<const float*>(place.shared + p.steps_at) + place.c;
  const float* const channels = reinterpret_cast<const float*>(place.shared + p.channels_at) + place.c;
  const int first = opaque(first_own_token<kLanes>(place.lane));
  const int exist = p.channels - walk.track.first_d - place.c;
  float draw[kShare][CH] = {}, dx[kShare][CH] = {}, skip[CH], dbias[CH], dskip[CH];
  int pixel[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int t = first + i * lanes;
    pixel[i] = !kAllHave && t >= kTile ? -1 : tile.pixels[t];
  }
  if (p.half && part.last_dx && !part.first_dx) {  // all tokens at once: this is far away
    const int64_t at = walk.dx + place.c;
    const int stride = walk.dx_pixel;
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (pixel[i] >= 0) read_dx<CH>(p, at_pixel(at, pixel[i], stride), exist, dx[i]);
  }
  const int sums_row = blockDim.x * CH;
  float* sums = reinterpret_cast<float*>(place.shared + p.channel_sums_at) + threadIdx.x * CH;
  read_floats<CH>(sums + kBiasRow * sums_row, dbias);
  read_floats<CH>(sums + kSkipRow * sums_row, dskip);
  read_floats<CH>(channels + kSkipRow * p.block_channels, skip);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int t = first + i * lanes;
    if (!kAllHave && t >= kTile) break;
    const int at = t * spacing.single;
    float sum[2 * CH], x[CH], dy[CH];
    const float* const token = tile.tokens + t * spacing.twin + place.c * 2;
    read_floats<CH>(tile.x + at + place.c, x);
    read_floats<CH>(tile.dy + at + place.c, dy);
    if constexpr (owns_tokens(kLanes)) {
#pragma unroll
      for (int v = 0; v < 2 * CH; ++v) sum[v] = own[i][v];
    } else {
      read_floats<2 * CH>(token, sum);
    }
    if constexpr (kLanes != 1) {
      float step[CH];
      read_floats<CH>(owns_tokens(kLanes) ? token : steps + at, step);
      finish_sums<CH, kZoh>(p, step, x, sum);
    }
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      draw[i][c] = sum[c];
      dx[i][c] += fmaf(skip[c], dy[c], sum[CH + c]);
      dbias[c] += draw[i][c];
      dskip[c] = fmaf(dy[c], x[c], dskip[c]);
    }
  }
  if (CH == 1 || p.channels % 2 == 0) {  // all channels or none
    if (exist >= CH) write_dx<CH, kShare>(p, walk, place.c, pixel, dx);
  } else {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      float one[kShare][1];
#pragma unroll
      for (int i = 0; i < kShare; ++i) one[i][0] = dx[i][c];
      if (c < exist) write_dx<1, kShare>(p, walk, place.c + c, pixel, one);
    }
  }
  if (p.ddelta != nullptr) {
    const int64_t at = walk.ddelta + place.c;
    const int stride = walk.ddelta_pixel;
#pragma unroll
    for (int i = 0; i < kShare; ++i)
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (pixel[i] >= 0 && c < exist) store_as(p.ddelta, at_pixel(at + c, pixel[i], stride), draw[i][c], p);
  }
  float* warp_sums =
      reinterpret_cast<float*>(place.shared + p.warp_sums_at) + warp * kTile * p.pitch + 2 * p.padded_states;
  write_floats<CH>(sums + kBiasRow * sums_row, dbias);
  write_floats<CH>(sums + kSkipRow * sums_row, dskip);
  sums += kWeightRows * sums_row;
  const float* weights = channels + kWeightRows * p.block_channels;
  const float* values = tile.low + first * p.low_pitch();
  // Two at a time; zeros follow an odd rank.
#pragma unroll 1
  for (int r = 0; r < p.rank; r += 2, warp_sums += 2, values += 2) {
    float w[2][CH], dw[2][CH], low[2 * kShare] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      read_floats<CH>(weights + k * p.block_channels, w[k]);
      read_floats<CH>(sums + k * sums_row, dw[k]);
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (!kAllHave && first + i * lanes >= kTile) break;
      float value[2];
      read_floats<2>(values + i * lanes * p.low_pitch(), value);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          low[k * kShare + i] = fmaf(draw[i][c], w[k][c], low[k * kShare + i]);
          dw[k][c] = fmaf(draw[i][c], value[k], dw[k][c]);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) write_floats<CH>(sums + k * sums_row, dw[k]);
    weights += 2 * p.block_channels;
    sums += 2 * sums_row;
    const int base = sum_over_lanes<kLanes, 32 * (kLanes > 0)>(low, lanes, 32, lane_id);
    const int held = max(1, 2 * kShare * lanes / 32);
#pragma unroll
    for (int v = 0; v < 2 * kShare; ++v) {
      const int k = (base + v) / kShare, t = first + (base + v) % kShare * lanes;
      if (v < held && lane_id < 2 * kShare * lanes && (kAllHave || t < kTile)) warp_sums[t * p.pitch + k] = low[v];
    }
  }
}

// The memory of a thread's warp.
template <int NS>
struct WarpMemory {
  static constexpr int kPitch = 32 * NS + kBatchPad;  // between the tokens of a batch
  int lane_id;
  float *sums, *scratch;  // rows of dproj; values to be summed over the lanes
  __device__ WarpMemory(const BackwardParams& p, const Place& place) : lane_id(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    sums = reinterpret_cast<float*>(place.shared + p.warp_sums_at) + warp * kTile * p.pitch;
    scratch = reinterpret_cast<float*>(place.shared + p.scratch_at) + warp * kBatch * kPitch;
  }
};

// The gradients of B or C of the thread's channels, token by token, to be summed over the warp's channels; `column` is
// where they belong in a row of dproj.
template <int NS, int kLanes>
struct StateSums {
  const BackwardParams& p;
  const WarpMemory<NS>& warp;
  const int column;
  float single[NS == 1 ? kTile : 1];

  // Token j of the tile; `complete`: it is the last of its batch to come.
  __device__ void add(int j, const float (&v)[NS], bool complete) {
    if constexpr (NS == 1) {
      single[j] = v[0];
    } else {
      float* const to = warp.scratch + j % kBatch * WarpMemory<NS>::kPitch + warp.lane_id * NS;
#pragma unroll
      for (int n = 0; n < NS; n += 4) write_floats<4>(to + n, {v[n], v[n + 1], v[n + 2], v[n + 3]});
      if (complete)
        sum_batch<NS, kLanes>(p, warp.scratch, warp.lane_id, warp.sums + (j - j % kBatch) * p.pitch + column);
    }
  }
  __device__ void finish() {
    if constexpr (NS == 1) {
      const int t = sum_over_lanes<1, 32>(single, 1, 32, warp.lane_id);
      if (warp.lane_id < kTile) warp.sums[t * p.pitch + column] = single[0];
    }
  }
};

// The sums over a channel's lanes, for the tokens that are this lane's; `scratch` holds [kBatch, lane of the warp,
// 2 * CH] with kSumPitch values between tokens: lanes that read different tokens find them in different banks.
template <int CH>
constexpr int kSumPitch = 32 * 2 * CH + 4;
// `first` is the first of them to take.
template <int CH, int kCount>
__device__ inline void own_sums(const float* from, int first, float (&sum)[2 * CH]) {
  read_floats<2 * CH>(from + first * 2 * CH, sum);
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    float v[2 * CH];
    read_floats<2 * CH>(from + (i ^ first) * 2 * CH, v);
#pragma unroll
    for (int c = 0; c < 2 * CH; ++c) sum[c] += v[c];
  }
}

// The states of a thread at the entry of the tiles of a piece, in shared memory: [tile, CH, NS / V, thread, V].
template <int NS, int CH>
struct History {
  static constexpr int V = NS % 4 == 0 ? 4 : 1;
  float* at;
  __device__ History(const BackwardParams& p, const Place& place)
      : at(reinterpret_cast<float*>(place.shared + p.history_at) + threadIdx.x * V) {}
  __device__ float* part(int tile, int c, int j) const {
    return at + ((tile * CH + c) * (NS / V) + j / V) * static_cast<int>(blockDim.x) * V;
  }
  __device__ void save(int tile, const float (&h)[CH][NS]) const {
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int j = 0; j < NS; j += V) {
        float v[V];
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = h[c][j + i];
        write_floats<V>(part(tile, c, j), v);
      }
  }
  __device__ void load(int tile, float (&h)[CH][NS]) const {
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int j = 0; j < NS; j += V) {
        float v[V];
        read_floats<V>(part(tile, c, j), v);
#pragma unroll
        for (int i = 0; i < V; ++i) h[c][j + i] = v[i];
      }
  }
};

// Along the scan through a tile: the state before each token, and the gradients of C.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ __forceinline__ void rebuild_tile(const BackwardParams& p, const Place& place, const WarpMemory<NS>& warp,
                                             const Tile& tile, const float (&a)[CH][kSharedDecay ? 1 : NS],
                                             float (&h)[CH][NS], float (&state)[kTile][CH][NS]) {
  const Spacing<kLanes> spacing(p);
  StateSums<NS, kLanes> dc_sums = {p, warp, p.padded_states};
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const int t = spacing.slot(j);
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int n = 0; n < NS; ++n) state[j][c][n] = h[c][n];
    advance<NS, CH, kLanes, kSharedDecay, kZoh>(p, tile, place, a, t, h);
    float dy[CH], dc[NS];
    read_floats<CH>(tile.dy + t * spacing.single + place.c, dy);
#pragma unroll
    for (int n = 0; n < NS; ++n) {
      dc[n] = dy[0] * h[0][n];
#pragma unroll
      for (int c = 1; c < CH; ++c) dc[n] = fmaf(dy[c], h[c][n], dc[n]);
    }
    dc_sums.add(j, dc, j % kBatch == kBatch - 1);
  }
  dc_sums.finish();
}

// Against the scan through a tile: the gradients of its states, and what becomes of them. The sums over a channel's
// states, d step and dh * B (zoh: dx), go to `own` or to the place of the step and the input.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ __forceinline__ void reverse_tile(const BackwardParams& p, const Place& place, const WarpMemory<NS>& warp,
                                             const Tile& tile, const float (&a)[CH][kSharedDecay ? 1 : NS],
                                             const float (&state)[kTile][CH][NS], float (&g)[CH][NS],
                                             float (&own)[own_tokens(kLanes)][2 * CH],
                                             float (&da)[CH][kSharedDecay ? 1 : NS]) {
  constexpr bool kOwned = owns_tokens(kLanes);
  static_assert(!kOwned || kSumPitch<CH> <= WarpMemory<NS>::kPitch, "in the same memory");
  const Spacing<kLanes> spacing(p);
  const int lanes = kLanes > 0 ? kLanes : p.state_lanes;
  StateSums<NS, kLanes> db_sums = {p, warp, 0};
  float batch_sums[kBatch][2 * CH];
#pragma unroll
  for (int j = kTile - 1; j >= 0; --j) {
    const int t = spacing.slot(j);
    const float* row = tile.rows + t * spacing.bc + place.lane * NS;
    float token[2 * CH], dy[CH], b[NS], c_row[NS], db[NS] = {};
    float sum[2 * CH] = {};  // over the thread's states: d step and dh * B (zoh: dx)
    read_floats<2 * CH>(tile.tokens + t * spacing.twin + place.c * 2, token);
    read_floats<CH>(tile.dy + t * spacing.single + place.c, dy);
    read_floats<NS>(row, b);
    read_floats<NS>(row + spacing.bc / 2, c_row);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const float shared_decay = kSharedDecay ? exp2_fast(token[c] * a[c][0]) : 0.f;
      float dz_sum = 0.f;  // with a shared decay, over the states
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        const float a_n = a[c][kSharedDecay ? 0 : n];
        const float e = kSharedDecay ? shared_decay : exp2_fast(token[c] * a_n);
        const float dh = fmaf(c_row[n], dy[c], g[c][n]);
        g[c][n] = e * dh;
        if constexpr (kSharedDecay && !kZoh) {
          dz_sum = fmaf(g[c][n], state[j][c][n], dz_sum);
          sum[CH + c] = fmaf(b[n], dh, sum[CH + c]);
          db[n] = fmaf(token[CH + c], dh, db[n]);
          continue;
        }
        const float dz = g[c][n] * state[j][c][n];
        if constexpr (kZoh) {
          const float natural = a_n * kLn2, z = token[c] * natural;
          const float bbar = zoh_weight(token[c], z, e, natural), x = token[CH + c], dbbar = dh * b[n] * x;
          da[c][kSharedDecay ? 0 : n] += fmaf(dbbar, zoh_weight_slope(token[c], z, e, bbar, natural), token[c] * dz);
          sum[c] += fmaf(dbbar, e, natural * dz);
          sum[CH + c] = fmaf(bbar, dh * b[n], sum[CH + c]);
          db[n] = fmaf(bbar * x, dh, db[n]);
        } else {
          float& da_n = da[c][kSharedDecay ? 0 : n];
          da_n = fmaf(token[c], dz, da_n);
          sum[c] = fmaf(a_n, dz, sum[c]);
          sum[CH + c] = fmaf(b[n], dh, sum[CH + c]);
          db[n] = fmaf(token[CH + c], dh, db[n]);
        }
      }
      if constexpr (kSharedDecay && !kZoh) {
        da[c][0] = fmaf(token[c], dz_sum, da[c][0]);
        sum[c] = a[c][0] * dz_sum;
      }
    }
    db_sums.add(j, db, j % kBatch == 0);
    if constexpr (kOwned) {
#pragma unroll
      for (int v = 0; v < 2 * CH; ++v) batch_sums[j % kBatch][v] = sum[v];
      if (j % kBatch == 0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          write_floats<2 * CH>(warp.scratch + i * kSumPitch<CH> + warp.lane_id * 2 * CH, batch_sums[i]);
        __syncwarp();
        const float* const from = warp.scratch + (warp.lane_id - place.lane) * 2 * CH;
        if constexpr (kLanes <= kBatch) {
#pragma unroll
          for (int i = 0; i < kBatch; i += kLanes)
            own_sums<CH, kLanes>(from + (place.lane + i) * kSumPitch<CH>, 0, own[(j + i) / kLanes]);
        } else {  // kParts lanes share a token; each adds as many lanes' values, from different banks
          constexpr int kParts = kLanes / kBatch;
          const int part = place.lane % kParts;
          float part_sum[2 * CH];
          own_sums<CH, kBatch>(from + place.lane / kParts * kSumPitch<CH> + part * kBatch * 2 * CH, part & 2, part_sum);
#pragma unroll
          for (int v = 0; v < 2 * CH; ++v) {
#pragma unroll
            for (int off = 1; off < kParts; off *= 2) part_sum[v] += __shfl_xor_sync(0xffffffffu, part_sum[v], off);
            if (part == j / kBatch) own[0][v] = part_sum[v];
          }
        }
        __syncwarp();
      }
      continue;
    }
    if constexpr (kLanes == 1) {  // at once what finish_tokens leaves to do for the other layouts
      float x[CH];
      read_floats<CH>(tile.x + t * spacing.single + place.c, x);
      finish_sums<CH, kZoh>(p, token, x, sum);
    }
    // In the place of the step and the input, which no lane of the channel needs any more.
    const int sum_base = sum_over_lanes<1, kLanes>(sum, 1, lanes, warp.lane_id);
    if constexpr (kLanes != 1) __syncwarp();  // the other lanes have read them
    const int sum_held = max(1, 2 * CH / lanes);
#pragma unroll
    for (int v = 0; v < 2 * CH; ++v)
      if (v < sum_held && place.lane < 2 * CH) tile.tokens[t * spacing.twin + place.c * 2 + sum_base + v] = sum[v];
  }
  db_sums.finish();
  __syncwarp();
}

// This chunk's part of the parameter gradients.
template <int NS, int CH, bool kSharedDecay>
__device__ inline void write_parameters(const BackwardParams& p, const Place& place, const Walk& walk,
                                        const float (&da)[CH][kSharedDecay ? 1 : NS]) {
  const Track track = walk.track;
  const int d = track.first_d + place.c;
  const float* const sums = reinterpret_cast<const float*>(place.shared + p.channel_sums_at) + threadIdx.x * CH;
  const int64_t mkd = track.mk(p) * p.channels + d;
  float* const part = p.parts + (int64_t{track.b} * p.chunks + walk.chunk) * p.part;
  if (threadIdx.x < p.part - p.used) part[p.used + threadIdx.x] = 0.f;
  auto over_lanes = [&](float v) {
    for (int off = 1; off < p.state_lanes; off *= 2) v += __shfl_xor_sync(0xffffffffu, v, off);
    return v;
  };
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const bool exists = d + c < p.channels, writes = exists && place.lane == 0;
#pragma unroll 1
    for (int row = 0; row < kWeightRows + p.rank; ++row) {
      const float sum = over_lanes(sums[row * blockDim.x * CH + c]);
      const int64_t at = row == kBiasRow   ? p.bias_at + mkd + c
                         : row == kSkipRow ? p.skip_at + mkd + c
                                           : p.weights_at + (mkd + c) * p.rank + row - kWeightRows;
      if (writes) part[at] = sum;
    }
    if constexpr (kSharedDecay) {
      const float sum = over_lanes(da[c][0]);
      if (writes) part[mkd + c] = sum;
    } else {
#pragma unroll
      for (int j = 0; j < NS; ++j) {
        const int n = place.lane * NS + j;
        if (exists && n < p.states) part[(mkd + c) * p.states + n] = da[c][j];
      }
    }
  }
}

// Phase 3: one chunk of one path, against the scan. g is the gradient that the chunk scanned next hands over.
// kLanes: state_lanes where known at compile time, else 0.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ void walk_back(const BackwardParams& p, const Place& place, const Walk& walk, float (&g)[CH][NS]) {
  float a[CH][kSharedDecay ? 1 : NS];
  load_decays<NS, CH, kSharedDecay>(p, walk.track, walk.track.first_d + place.c, place.lane, a);
  float da[CH][kSharedDecay ? 1 : NS] = {};
  // The gradients of what is staged of the channels, of the thread's share of the tokens: rows like theirs.
  float* const channel_sums = reinterpret_cast<float*>(place.shared + p.channel_sums_at);
  for (int i = 0; i < channel_rows(p.rank) * CH; ++i) channel_sums[i * blockDim.x + threadIdx.x] = 0.f;
  lay_out_quads(p, place, walk);
  const History<NS, CH> history(p, place);
  const WarpMemory<NS> warp(p, place);
  constexpr bool kTilesSaved = NS == 1;
  const int64_t first_saved = walk.track.mbk(p) * p.pieces();
  auto load_saved = [&](int q0, float (&h)[CH][NS]) {
    const int64_t piece = first_saved + (q0 >> p.checkpoint_shift);
    load_state<NS, CH>(p, p.saved_states + piece * p.states * p.channels, walk.track.first_d + place.c, place.lane, h);
  };

#pragma unroll 1
  for (int piece = 0, pieces = kTilesSaved ? 1 : walk.pieces; piece < pieces; ++piece) {
    const int place_of_piece = walk.track.reversed ? piece : pieces - 1 - piece;
    const int piece_begin = walk.begin + place_of_piece * kPiece;
    const int tiles =
        ((kTilesSaved ? walk.end : min(piece_begin + kPiece, walk.end)) - piece_begin + kTile - 1) / kTile;
    const int scanned = kTilesSaved ? 0 : tiles - 1;  // for the states at the entries of the tiles after them
    auto first_token = [&](int tile) { return piece_begin + (walk.track.reversed ? tiles - 1 - tile : tile) * kTile; };
    __syncthreads();  // the buffers of the piece before are free
    if (scanned > 0) {
      issue_tile<Reads::b_x>(p, place, walk, first_token(0), 0);
    } else {
      issue_tile<Reads::all>(p, place, walk, first_token(tiles - 1), ~tiles & 1);
    }
    float h[CH][NS] = {};
    load_saved(first_token(kTilesSaved ? tiles - 1 : 0), h);
    // Along the scan: the state at the entry of every tile.
#pragma unroll 1
    for (int i = 0; i < scanned; ++i) {
      history.save(i, h);
      const Tile tile = prepare_tile<Reads::b_x, kZoh, CH, kLanes>(p, place, walk, first_token(i), i & 1, [&] {
        if (i + 1 < scanned) {
          issue_tile<Reads::b_x>(p, place, walk, first_token(i + 1), ~i & 1);
        } else {
          issue_tile<Reads::all>(p, place, walk, first_token(i + 1), ~i & 1);
        }
      });
#pragma unroll 4
      for (int j = 0; j < kTile; ++j) advance<NS, CH, kLanes, kSharedDecay, kZoh>(p, tile, place, a, j, h);
    }
    // Against it: tile by tile.
#pragma unroll 1
    for (int i = tiles - 1; i >= 0; --i) {
      const Tile tile = prepare_tile<Reads::all, kZoh, CH, kLanes>(p, place, walk, first_token(i), i & 1, [&] {
        if (i > 0) issue_tile<Reads::all>(p, place, walk, first_token(i - 1), ~i & 1);
      });
      float before[kTilesSaved ? CH : 1][NS] = {};  // the state at the entry of the tile before this one
      if constexpr (kTilesSaved) {
        if (i > 0) load_saved(first_token(i - 1), before);
      } else {
        if (i < tiles - 1) history.load(i, h);
      }
      float state[kTile][CH][NS], own[own_tokens(kLanes)][2 * CH];
      rebuild_tile<NS, CH, kLanes, kSharedDecay, kZoh>(p, place, warp, tile, a, h, state);
      reverse_tile<NS, CH, kLanes, kSharedDecay, kZoh>(p, place, warp, tile, a, state, g, own, da);
      finish_tokens<CH, kLanes, kZoh>(p, place, walk, tile, own);
      __syncthreads();
      write_dproj(p, place, walk, tile);
      if constexpr (kTilesSaved) {
#pragma unroll
        for (int c = 0; c < CH; ++c) h[c][0] = before[c][0];
      }
    }
  }
  write_parameters<NS, CH, kSharedDecay>(p, place, walk, da);
}

// from + count, opaque to the compiler: of a row of addresses, only the next one is kept in a register.
template <typename T>
__device__ inline T* opaque_next(T* from, int64_t count) {
  T* next;
  asm volatile("add.s64 %0, %1, %2;" : "=l"(next) : "l"(from), "l"(count * int64_t{sizeof(T)}));
  return next;
}

// The parameter gradients from their parts. One grid's work; `scratch` holds four floats a thread.
__device__ inline void add_parts(const BackwardParams& p, float4* scratch) {
  constexpr int kTogether = 8;  // loads in flight
  // A block adds up `across` neighbouring quads at a time, each by as many threads, or runs of parts, as the grid has.
  const int threads = static_cast<int>(blockDim.x);
  const int64_t quads = p.part / 4;
  int runs = threads / 4;
  while (runs > 1 && quads * runs > int64_t{gridDim.x} * threads) runs /= 2;
  const int across = threads / runs, run = static_cast<int>(threadIdx.x) / across;
  const int place = static_cast<int>(threadIdx.x) % across, parts = p.batch * p.chunks;
  const int length = (parts + runs - 1) / runs;
  const float4* const from = reinterpret_cast<const float4*>(p.parts);
  for (int64_t first = int64_t{blockIdx.x} * across; first < quads; first += int64_t{gridDim.x} * across) {
    const int64_t i = first + place;
    const int last = i < quads && run < runs ? min((run + 1) * length, parts) : 0;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](const float4& v) { sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w); };
#pragma unroll 1
    for (int at = run * length; at < last; at += kTogether) {
      float4 v[kTogether];
      const float4* quad = from + at * quads + i;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        v[j] = at + j < last ? __ldcg(quad) : make_float4(0.f, 0.f, 0.f, 0.f);
        quad = opaque_next(quad, quads);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) add(v[j]);
    }
    for (int left = runs; left > 1;) {
      const int half = (left + 1) / 2;
      scratch[threadIdx.x] = sum;
      __syncthreads();
      if (run + half < left) add(scratch[threadIdx.x + half * across]);
      __syncthreads();
      left = half;
    }
    if (run == 0 && i < quads) {
      const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t value = i * 4 + j;
        if (value < p.weights_at) {
          p.da[value] = v[j];
        } else if (value < p.bias_at) {
          p.ddt_weight[value - p.weights_at] = v[j];
        } else if (value < p.skip_at) {
          if (p.ddt_bias != nullptr) p.ddt_bias[value - p.bias_at] = v[j];
        } else if (value < p.used && p.dd != nullptr) {
          p.dd[value - p.skip_at] = v[j];
        }
      }
    }
  }
}

// The sum of `copies` arrays of `count` floats, `stride` apart, in the type of the activations. One grid's work.
__device__ inline void add_copies(const BackwardParams& p, void* to, const float* from, int copies, int64_t stride,
                                  int64_t count) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t quads = reinterpret_cast<uintptr_t>(to) % (4 * p.element()) == 0 ? count / 4 : 0;
#pragma unroll 1
  for (int64_t i = thread; i < quads; i += threads) {
    float4 sum = __ldcg(reinterpret_cast<const float4*>(from) + i);
#pragma unroll 4
    for (int copy = 1; copy < copies; ++copy) {
      const float4 more = __ldcg(reinterpret_cast<const float4*>(from + copy * stride) + i);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    if (p.half) {
      static_cast<uint2*>(to)[i] =
          make_uint2(encode(sum.x, p.dtype) | static_cast<uint32_t>(encode(sum.y, p.dtype)) << 16,
                     encode(sum.z, p.dtype) | static_cast<uint32_t>(encode(sum.w, p.dtype)) << 16);
    } else {
      static_cast<float4*>(to)[i] = sum;
    }
  }
#pragma unroll 1
  for (int64_t i = quads * 4 + thread; i < count; i += threads) {
    float sum = __ldcg(from + i);
#pragma unroll 1
    for (int copy = 1; copy < copies; ++copy) sum += __ldcg(from + copy * stride + i);
    store_as(to, i, sum, p);
  }
}

template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__global__ void __launch_bounds__(kMaxThreads, min_blocks(NS))
    ss2d_backward_kernel(const __grid_constant__ BackwardParams p) {
  extern __shared__ float4 shared_base[];
  const int lanes = kLanes > 0 ? kLanes : p.state_lanes;
  const Place place = {static_cast<int>(threadIdx.x) % lanes, static_cast<int>(threadIdx.x) / lanes * CH,
                       reinterpret_cast<char*>(shared_base)};
  const int64_t plane = int64_t{p.states} * p.channels;

  // Zeros where staged rows are padded: B and C of states that do not exist.
  auto clear = [&] {
    __syncthreads();
    for (int i = threadIdx.x; i < p.history_at / 16; i += blockDim.x) shared_base[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();
  };
  clear();
  if (p.chunks > 1) {
    const int summaries = p.chunks - 1, tasks = p.modalities * p.batch * p.groups * p.paths * summaries;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
      const int nth = task / summaries, sequence = nth / p.paths;
      const Track track(p, sequence / p.groups, nth - sequence * p.paths, sequence % p.groups);
      const int chunk = task - nth * summaries + (track.reversed ? 0 : 1);  // nothing comes from the last
      const int d = track.first_d + place.c;
      float g[CH][NS] = {}, steps[CH] = {};
      summarize_chunk<NS, CH, kLanes, kSharedDecay>(p, place, track, chunk, g, steps);
      const int64_t at = track.mbk(p) * p.chunks + chunk;
      store_state<NS, CH>(p, p.chunk_state + at * plane, d, place.lane, g);
      if (place.lane == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (d + c < p.channels) p.chunk_steps[at * p.channels + d + c] = steps[c];
      }
    }
    cooperative_groups::this_grid().sync();
    prefix_chunks<kSharedDecay>(p, true, reinterpret_cast<float*>(shared_base));
    clear();
    cooperative_groups::this_grid().sync();
  }
#pragma unroll 1
  for (int i = 0;; ++i) {
    const bool done = i == p.rounds;
    if (done || (i == p.row_paths && i > 0)) cooperative_groups::this_grid().sync();
    if (done) break;
    // One number for the task and its turn: registers are short.
#pragma unroll 1
    for (int at = blockIdx.x * p.turns; at < p.walks;) {
      const int task = at / p.turns, turn = at - task * p.turns;
      const int place_of_chunk = task / p.splits, sequence = place_of_chunk / p.chunks;
      const int chunk = place_of_chunk - sequence * p.chunks, path = sequence / p.images;  // 0 unless all paths at once
      const int first = (task - place_of_chunk * p.splits) * p.share, groups = min(p.share, p.groups - first);
      const int m = turn / groups, in_split = turn - m * groups;  // without a shared source, m is 0 here
      const bool last = in_split == groups - 1, last_turn = last && (m > 0 || !p.shared_source);
      const Track track(p, m * p.batch + sequence - path * p.images, p.order[i + path], first + in_split);
      float g[CH][NS] = {};
      if (p.chunks > 1)
        load_state<NS, CH>(p, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane, track.first_d + place.c,
                           place.lane, g);
      const Contribution part = {in_split == 0,
                                 last && p.splits == 1,
                                 turn == 0,
                                 last_turn && p.splits == 1,
                                 in_split == 0 && p.shared_source && p.source(track.m) != track.m,
                                 i == 0 || p.x_per_path,
                                 i == p.paths - 1 || p.x_per_path};
      const int next = last_turn ? (task + gridDim.x) * p.turns : at + 1;
      const Walk& walk = begin_walk<Reads::all>(p, place, track, chunk, part);
      if (threadIdx.x == 0) const_cast<Walk&>(walk).next = next;
      walk_back<NS, CH, kLanes, kSharedDecay, kZoh>(p, place, walk, g);
      at = walk.next;
    }
  }
  add_parts(p, shared_base);
  const int64_t tokens = int64_t{p.modalities} * p.batch * p.tokens;
  if (p.splits > 1) add_copies(p, p.dproj, p.dproj_sum, p.splits, p.dproj_copy, tokens * p.paths * p.row());
  if (p.dx_apart) add_copies(p, p.dx, p.dx_sum, p.paths, p.dx_copy, tokens * p.channels);
}

using BackwardKernel = void (*)(BackwardParams);

// kLanes of the kernel.
int known_lanes(const SS2DProblem& problem, const Layout& layout) {
  if (problem.discretization != Discretization::euler) return 0;
  return layout.states_per_thread <= kDefaultStates ? layout.state_lanes : 0;
}

// Eight states of one channel only where 32 lanes of four do not suffice.
template <bool kSharedDecay, bool kZoh>
BackwardKernel kernel_with(const Layout& layout) {
  if (layout.states_per_thread == 8) return ss2d_backward_kernel<8, 1, 0, kSharedDecay, kZoh>;
  if constexpr (kZoh) {
    return ss2d_backward_kernel<4, 2, 0, kSharedDecay, true>;
  } else {
    if constexpr (!kSharedDecay) {
      if (layout.states_per_thread == 1) return ss2d_backward_kernel<1, 2, 1, false, false>;
    }
    switch (layout.state_lanes) {
      case 1:
        return ss2d_backward_kernel<4, 2, 1, kSharedDecay, false>;
      case 2:
        return ss2d_backward_kernel<4, 2, 2, kSharedDecay, false>;
      case 4:
        return ss2d_backward_kernel<4, 2, 4, kSharedDecay, false>;
      case 8:
        return ss2d_backward_kernel<4, 2, 8, kSharedDecay, false>;
      case 16:
        return ss2d_backward_kernel<4, 2, 16, kSharedDecay, false>;
      default:
        return ss2d_backward_kernel<4, 2, 32, kSharedDecay, false>;
    }
  }
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
  layout.pitch = 2 * layout.padded_states + static_cast<int>(ceil_div(problem.rank, 4) * 4);  // no more than it needs
  return layout;
}

// The buffers for tiles of `tokens`, with x and the inputs made of it or without.
Stage lay_out_stage(const SS2DProblem& problem, const Layout& layout, const BackwardParams& params, int tokens,
                    bool with_x, SharedBytes& shared) {
  const int element = problem.dtype == DType::f32 ? 4 : 2;
  const int buffers = element == 2 ? 1 : 2;
  const int raw_bytes = buffers * tokens * params.single * element, decoded_bytes = tokens * params.single * 4;
  Stage stage{};
  stage.pixels_at = shared.reserve(2 * tokens * static_cast<int>(sizeof(int)));
  stage.rows_at = shared.reserve(buffers * tokens * layout.pitch * element);
  const int low = layout.pitch - 2 * layout.padded_states, warps = layout.threads / 32;
  if (element == 2) stage.decoded_rows_at = shared.reserve(tokens * (2 * layout.padded_states + warps * low) * 4);
  if (with_x) stage.x_at = shared.reserve(raw_bytes);
  stage.dy_at = shared.reserve(raw_bytes);
  if (element == 2) {
    stage.decoded_x_at = with_x ? shared.reserve(decoded_bytes) : 0;
    stage.decoded_dy_at = shared.reserve(decoded_bytes);
  }
  if (problem.rank == 0) stage.delta_at = shared.reserve(raw_bytes);
  stage.token_at = shared.reserve(tokens * (with_x ? params.twin : params.single) * 4);
  return stage;
}

// Shared memory of a block; its size goes to the layout.
void lay_out(const SS2DProblem& problem, Layout& layout, BackwardParams& params) {
  const int channels = layout.block_channels, rank = static_cast<int>(problem.rank);
  const int lanes = known_lanes(problem, layout);
  const int spaced = known_channels(lanes) > 0 ? known_channels(lanes) : channels;
  params.single = single_of(spaced);
  params.twin = twin_of(spaced);
  SharedBytes shared;
  params.walk_at = shared.reserve(sizeof(Walk));
  params.by_quads = FastDiv(static_cast<uint32_t>(layout.pitch / 4));
  params.quads_at = shared.reserve(static_cast<int>(params.by_quads.divisor * sizeof(Quad)));
  params.channels_at = shared.reserve(channel_rows(rank) * channels * 4);
  SharedBytes wide = shared;
  params.wide = lay_out_stage(problem, layout, params, kWideTile, false, wide);
  params.narrow = lay_out_stage(problem, layout, params, kTile, true, shared);
  if (lanes == 0) params.steps_at = shared.reserve(kTile * params.single * 4);
  params.channel_sums_at = shared.reserve(channel_rows(rank) * layout.threads * layout.channels_per_thread * 4);
  params.warp_sums_at = shared.reserve(layout.threads / 32 * kTile * layout.pitch * 4);
  if (layout.states_per_thread > 1)
    params.scratch_at = shared.reserve(layout.threads / 32 * kBatch * (32 * layout.states_per_thread + kBatchPad) * 4);
  shared.count = std::max(shared.count, wide.count);
  const int history = layout.states_per_thread == 1
                          ? 0
                          : (kTilesPerPiece - 1) * layout.states_per_thread * layout.channels_per_thread * 4;
  params.history_at = shared.reserve(history * layout.threads);
  layout.shared_bytes = static_cast<size_t>(shared.count);
}

bool shares_source(const SS2DProblem& problem) {
  return problem.exchange == Exchange::from_visible || problem.exchange == Exchange::from_infrared;
}

// How the work is cut into tasks: (path if all at once, image, chunk, split).
struct BackwardPlan : Plan {
  int64_t splits, share;  // tasks for the blocks of channels of a chunk; blocks of channels of each but the last
  bool all_paths;         // at once; else one after another
  int64_t cost;           // roughly, in steps of a block
  int64_t dproj_copy = 0, dx_copy = 0;
  size_t parts_at;
};

// Parameter gradients of a chunk, rounded up to whole quads.
int64_t part_of(const SS2DProblem& problem) {
  const int64_t per_channel = problem.decays() + problem.rank + kWeightRows;
  return ceil_div(problem.modalities * problem.paths * problem.channels * per_channel, 4) * 4;
}

BackwardPlan plan_with(const SS2DProblem& problem, const Layout& layout, int64_t resident, int64_t splits,
                       bool all_paths) {
  const int64_t images = (shares_source(problem) ? 1 : problem.modalities) * problem.batch;
  const int64_t per_task = shares_source(problem) ? 2 : 1, at_once = all_paths ? problem.paths : 1;
  BackwardPlan plan{chunk_plan(problem, layout, images * splits * at_once, resident, 2,
                               std::max<int64_t>(checkpoint_of(problem.states), kWideTile))};
  plan.splits = splits;
  plan.share = ceil_div(layout.groups, splits);
  plan.all_paths = all_paths;
  // Tasks of phase 1; they take about two fifths of the time, and what comes before and after a walk about that of 16
  // tokens.
  const int64_t summaries = problem.modalities * problem.batch * layout.groups * problem.paths * (plan.chunks - 1);
  plan.cost = (ceil_div(ceil_div(problem.tokens(), plan.granule), plan.chunks) * plan.granule + 16) *
              (5 * ceil_div(plan.tasks, resident) * plan.share * per_task * (problem.paths / at_once) +
               2 * ceil_div(summaries, resident));
  plan.grid = std::max<int64_t>(1, std::min<int64_t>(resident, std::max(plan.tasks, summaries)));
  plan.parts_at = plan.reserve(problem.batch * plan.chunks * part_of(problem));
  const bool is_float = problem.dtype == DType::f32;
  const int64_t tokens = problem.modalities * problem.batch * problem.tokens(), dx = tokens * problem.channels;
  const int64_t dproj = tokens * problem.paths * (problem.rank + 2 * problem.states);
  if (all_paths) {
    plan.dx_copy = ceil_div(dx, 4) * 4;
    plan.sum_at = plan.reserve(problem.paths * plan.dx_copy);
  } else if (!is_float && problem.paths > 1) {
    plan.sum_at = plan.reserve(dx);
  }
  if (splits > 1) {
    plan.dproj_copy = ceil_div(dproj, 4) * 4;
    plan.dproj_sum_at = plan.reserve(splits * plan.dproj_copy);
  } else if (!is_float && (layout.groups > 1 || shares_source(problem))) {
    plan.dproj_sum_at = plan.reserve(dproj);
  }
  return plan;
}

// More tasks than chunks only where they should save a fifth at least and cost at most 64 MiB of memory.
constexpr size_t kFloatsForCopies = size_t{16} << 20;

BackwardPlan plan_of(const SS2DProblem& problem, BackwardParams& params) {
  Layout layout = layout_of(problem);
  lay_out(problem, layout, params);
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel_of(problem, layout)), layout);
  const BackwardPlan simple = plan_with(problem, layout, resident, 1, false);
  BackwardPlan best = simple;
  for (int all_paths = 0; all_paths < (problem.paths > 1 ? 2 : 1); ++all_paths) {
    for (int64_t splits = 1; splits <= layout.groups; ++splits) {
      const int64_t share = ceil_div(layout.groups, splits);
      if (ceil_div(layout.groups, share) != splits) continue;  // fewer do as well
      const BackwardPlan plan = plan_with(problem, layout, resident, splits, all_paths != 0);
      if (plan.workspace_floats > simple.workspace_floats + kFloatsForCopies || plan.cost * 5 > simple.cost * 4)
        continue;
      if (plan.cost < best.cost || (plan.cost == best.cost && plan.workspace_floats < best.workspace_floats))
        best = plan;
    }
  }
  return best;
}

}  // namespace

size_t ss2d_backward_workspace(const SS2DProblem& problem) {
  BackwardParams params{};
  return plan_of(problem, params).workspace_floats * sizeof(float);
}

void ss2d_backward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DGradients& gradients,
                   void* workspace, void* stream) {
  BackwardParams params{};
  const BackwardPlan plan = plan_of(problem, params);
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
  const int per_task = params.shared_source ? 2 : 1;
  params.images = params.modalities / per_task * params.batch;
  params.splits = static_cast<int>(plan.splits);
  params.share = static_cast<int>(plan.share);
  params.turns = per_task * params.share;
  params.walks = static_cast<int>(plan.tasks) * params.turns;
  params.rounds = plan.all_paths ? 1 : params.paths;
  params.dx_apart = plan.all_paths && !params.x_per_path;
  params.dproj_copy = plan.dproj_copy;
  params.dx_copy = plan.dx_copy;
  params.paired = problem.states % 2 == 0 && problem.rank % 2 == 0;
  params.dx = gradients.dx;
  params.dx_sum = is_float && !params.dx_apart ? static_cast<float*>(gradients.dx) : floats + plan.sum_at;
  params.dproj = gradients.dproj;
  params.dproj_sum = is_float && plan.splits == 1 ? static_cast<float*>(gradients.dproj) : floats + plan.dproj_sum_at;
  params.ddelta = gradients.ddelta;
  params.ddt_weight = static_cast<float*>(gradients.ddt_weight);
  params.ddt_bias = static_cast<float*>(gradients.ddt_bias);
  params.da = static_cast<float*>(gradients.da);
  params.dd = static_cast<float*>(gradients.dd);
  const int64_t per_channel = problem.modalities * problem.paths * problem.channels;
  params.parts = floats + plan.parts_at;
  params.part = part_of(problem);
  params.weights_at = per_channel * problem.decays();
  params.bias_at = params.weights_at + per_channel * problem.rank;
  params.skip_at = params.bias_at + per_channel;
  params.used = params.skip_at + per_channel;
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
