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
//
// The loop of phase 3 should stay in the instruction cache, where three blocks stand at different places of it: what
// few problems need of it should be little code, even where that is slow.
#pragma once

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {

// The kernel for a problem, by element type: compiling one is most of the work of a build, so each has a file.
const void* ss2d_backward_kernel_f32(const SS2DProblem&, const Layout&);
const void* ss2d_backward_kernel_f16(const SS2DProblem&, const Layout&);

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
  FastDiv by_parts;  // threads for each token
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
  bool whole;                   // where all channels of a block exist, a tile's copies need no loops
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
// The lanes of a channel, kLanes, are known at compile time. Where a block has few channels, of which a thread has CH,
// these are constants too (else 0), so that the tokens of a tile are immediate offsets.
constexpr int known_channels(int lanes, int ch) { return lanes >= 4 ? kMaxThreads / lanes * ch : 0; }
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
constexpr int share_of(int tokens, int lanes) { return lanes < tokens ? tokens / lanes : 1; }
template <int CH, int kLanes>
struct Spacing {
  static constexpr int kChannels = known_channels(kLanes, CH);
  int single, twin;
  __device__ explicit Spacing(const BackwardParams& p)
      : single(kChannels > 0 ? single_of(kChannels) : p.single), twin(kChannels > 0 ? twin_of(kChannels) : p.twin) {}
  // Slot t of a tile where its address shall not be hoisted out of a loop into registers.
  __device__ static int slot(int t) { return kChannels > 0 ? t : opaque(t); }
};
// States of a channel in a staged row.
constexpr int padded_states_of(int states_per_thread, int lanes) { return padded_of(states_per_thread) * lanes; }

// What a walk reads of a token, and so stages: for phase 1, or for phase 3, and there only B and x on the way along the
// scan.
enum class Reads { c_dy, all };
constexpr int tile_of(Reads reads) { return reads == Reads::c_dy ? kWideTile : kTile; }
template <Reads kReads>
__device__ inline const Stage& stage_of(const BackwardParams& p) {
  return kReads == Reads::c_dy ? p.wide : p.narrow;
}

// Rows of what is staged of the channels: an even number of dt_weight.
__host__ __device__ inline int channel_rows(int rank) { return kWeightRows + rank + rank % 2; }

// Which threads of a warp share a channel: the order of a warp is that of its channels, and within one of its `lanes`
// lanes. Threads are in that order but for one bit, the lowest of the channel, which is a thread's lowest. So what the
// lanes read is the same for neighbours one apart, and what channels read for neighbours two apart: a load of 16 bytes
// takes half as long then as where neither is.
__device__ inline int place_in_warp(int thread, int lanes) {
  if (lanes == 1 || lanes == 32) return thread;
  const int rest = thread & -2 * lanes;
  return rest + (thread & 1) * lanes + ((thread - rest) >> 1);
}
// The value of the thread whose place in its warp differs in the bit `off`.
__device__ inline float from_place(float v, int off, int lanes) {
  return __shfl_xor_sync(0xffffffffu, v, off > lanes || lanes == 32 ? off : off == lanes ? 1 : 2 * off);
}

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
  bool first_dx, last_dx;    // to dx: one per path
};

// What a walk of one block along one path keeps at hand, in shared memory.
struct Walk {
  Run runs[kRuns];
  Track track;
  bool whole;             // BackwardParams::whole, and all channels of the block exist
  int chunk, begin, end;  // tokens [begin, end) of the axis
  Contribution part;
  int next;  // where the kernel's loop goes on: kept here, as registers are short
  // Elements, at pixel 0: of dx and ddelta the first channel of the block, of dproj the row of the walk's own low-rank
  // part and that of the B and C it reads; and from pixel to pixel.
  int64_t dx, ddelta, own_row, bc_row;
  int dx_pixel, ddelta_pixel, row_pixel;
  __device__ Walk(const BackwardParams& p, const Track& t, int chunk, const Contribution& part, const Stage& stage,
                  int tile)
      : track(t),
        whole(p.whole && t.first_d + p.block_channels <= p.channels),
        chunk(chunk),
        begin(p.begin_of(chunk)),
        end(p.begin_of(chunk + 1)),
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
  const Stage& stage = stage_of<kReads>(p);
  if (threadIdx.x == 0) *walk = Walk(p, track, chunk, part, stage, tile_of(kReads));
  if (track.first_d + p.block_channels > p.channels) {  // zeros for channels that do not exist, as past the end
    const int bytes = (p.half ? 1 : 2) * tile_of(kReads) * p.single * p.element();
    auto clear = [&](int at) { clear_shared(place.shared + at, bytes, threadIdx.x, blockDim.x); };
    clear(stage.dy_at);
    if constexpr (kReads == Reads::all) clear(stage.x_at);
    if (p.rank == 0) clear(stage.delta_at);
  }
  copies_wait();
  __syncthreads();
  return *walk;
}

// at + pixel * stride, of numbers that are not negative: one instruction.
__device__ inline int64_t at_pixel(int64_t at, int pixel, int stride) {
  return at + static_cast<int64_t>(uint64_t{static_cast<uint32_t>(pixel)} * static_cast<uint32_t>(stride));
}

// One of `parts` threads' share of the `bytes` of a token, in pieces of kPiece.
template <int kPiece>
__device__ inline void copy_pieces(uint32_t to, const char* from, int bytes, bool zeros, int part, int parts) {
#pragma unroll 1
  for (int i = part * kPiece; i < bytes; i += parts * kPiece) copy_async_or_zeros<kPiece>(to + i, from + i, zeros);
}

// The token in a slot of a tile; its pixel is noted for who needs it later if `notes`. Past the end: -1 is noted, and
// zeros are staged, with which nothing is added to states and gradients, whatever its step.
struct Token {
  int pixel;  // past the end: the last token's once more
  bool past_end;
};
template <Reads kReads>
__device__ inline Token token_of(const BackwardParams& p, char* shared, const Walk& walk, int q0, int buffer, int slot,
                                 bool notes) {
  constexpr int kTokens = tile_of(kReads);
  const int q = q0 + (walk.track.reversed ? kTokens - 1 - slot : slot);
  const Token token = {walk.track.pixel(p, min(q, p.tokens - 1)), q >= p.tokens};
  if (notes)
    reinterpret_cast<int*>(shared + stage_of<kReads>(p).pixels_at)[buffer * kTokens + slot] =
        token.past_end ? -1 : token.pixel;
  return token;
}

// Starts the copies of the tile of tokens [q0, q0 + kTokens) in the order of the scan, into buffer 0 or 1 (of
// float): each warp takes runs.
template <Reads kReads>
__device__ inline void issue_runs(const BackwardParams& p, char* shared, const Walk& walk, int q0, int buffer,
                                  bool back) {
  constexpr int kTokens = tile_of(kReads), kLanes = 32 / kTokens;
  const int lane_id = opaque(threadIdx.x % 32), warp = threadIdx.x / 32;
  const int slot = lane_id / kLanes, lane = lane_id % kLanes;
  const Token token = token_of<kReads>(p, shared, walk, q0, buffer, slot, warp == 0);
  const int count = kReads == Reads::c_dy || !back ? 3 : p.pairs || p.padded_states == p.states ? 4 : 5;
#pragma unroll 1
  for (int i = warp; i < count; i += blockDim.x / 32) {
    const Run run = walk.runs[kReads == Reads::all ? (back ? kX : kB) + i : i < 2 ? kLow + i : kC];
    const char* const from = run.from + int64_t{token.pixel} * run.pixel;
    char* const to = shared + run.to + buffer * run.buffer_pitch + slot * run.token_pitch;
    const uint32_t at = shared_address(to);
    if (run.granule == 16) {
      copy_pieces<16>(at, from, run.bytes, token.past_end, lane, kLanes);
    } else if (run.granule == 8) {
      copy_pieces<8>(at, from, run.bytes, token.past_end, lane, kLanes);
    } else if (run.granule == 4) {
      copy_pieces<4>(at, from, run.bytes, token.past_end, lane, kLanes);
    } else {  // 16-bit rows that start on odd elements: cp.async cannot
#pragma unroll 1
      for (int j = lane * 2; j < run.bytes; j += kLanes * 2)
        *reinterpret_cast<uint16_t*>(to + j) = token.past_end ? 0 : *reinterpret_cast<const uint16_t*>(from + j);
    }
  }
}

// issue_runs where walk.whole: all threads at once, as many for each token.
template <Reads kReads, bool kHalf, int NS, int CH, int kLanes>
__device__ inline void issue_whole_tile(const BackwardParams& p, const Place& place, const Walk& walk, int q0,
                                        int buffer, bool back) {
  constexpr int kTokens = tile_of(kReads), kElement = kHalf ? 2 : 4;
  constexpr int kPadded = padded_states_of(NS, kLanes) * kElement;  // of B, of C
  // 16 bytes of the channels of a block for each thread of a token, however many threads there are. 0: not for each.
  constexpr int kCount = CH * kElement * kTokens / (16 * kLanes);
  // One of each state comes together in 16 bits; C alone where B is not needed.
  constexpr bool kPair = NS == 1 && kHalf, kOnlyC = kReads == Reads::c_dy && !kPair;
  const Stage& stage = stage_of<kReads>(p);
  const int thread = opaque(threadIdx.x), parts = static_cast<int>(stage.by_parts.divisor);
  const int in_tile = stage.by_parts.quotient(thread), part = thread - in_tile * parts;
  const Token token = token_of<kReads>(p, place.shared, walk, q0, buffer, in_tile, part == 0);
  const bool zeros = token.past_end;
  // All addresses before the first copy, behind which what is in shared memory would be read again.
  auto at_token = [&](RunOf run, int stride, int piece) {
    return walk.runs[run].from + (static_cast<uint32_t>(token.pixel) * static_cast<uint32_t>(stride) + part * piece);
  };
  const bool wide_rows = !kHalf && p.proj.granule >= 8;
  const char* const x = at_token(kX, p.x.pixel, 16);
  const char* const dy = at_token(kDy, p.dy.pixel, 16);
  const char* const bc = at_token(kOnlyC ? kC : kB, p.proj.pixel, NS == 1 ? kElement : 0);
  const char* const low = at_token(kLow, p.rank > 0 ? p.proj.pixel : p.delta.pixel, p.rank > 0 ? 0 : 16);
  const uint32_t shared = shared_address(place.shared) + opaque(0), slot = (kHalf ? 0 : buffer * kTokens) + in_tile;
  const uint32_t at = shared + slot * (Spacing<CH, kLanes>(p).single * kElement) + part * 16;
  const uint32_t rows = shared + stage.rows_at + (kHalf ? 0 : buffer * kTokens * p.pitch * kElement);
  const uint32_t row = rows + in_tile * 2 * kPadded + (kOnlyC ? kPadded : 0);
  const uint32_t low_row = rows + kTokens * 2 * kPadded + in_tile * p.low_pitch() * kElement;
  auto copy_channels = [&](int to, const char* from) {
    if (kCount == 0 && part * 16 >= p.block_channels * kElement) return;
#pragma unroll
    for (int i = 0; i < (kCount == 0 ? 1 : kCount); ++i)
      copy_async_or_zeros<16>(at + to + i * parts * 16, from + i * parts * 16, zeros);
  };
  if constexpr (kReads == Reads::all) copy_channels(stage.x_at, x);
  if (kReads == Reads::c_dy || back) copy_channels(stage.dy_at, dy);
  const int states = back && kReads == Reads::all && !kPair ? 2 * kPadded : kPadded;
  if constexpr (NS == 1) {
    if (part * kPadded < states) copy_async_or_zeros<4>(row + part * kPadded, bc, zeros);
  } else if (wide_rows) {
    copy_pieces<8>(row, bc, states, zeros, part, parts);
  } else {
    copy_pieces<4>(row, bc, states, zeros, part, parts);
  }
  if (p.rank > 0) {
    copy_pieces<4>(low_row, low, p.rank * kElement, zeros, part, parts);
  } else {
    copy_channels(stage.delta_at, low);
  }
}

template <Reads kReads, bool kHalf, int NS, int CH, int kLanes>
__device__ inline void issue_tile(const BackwardParams& p, const Place& place, const Walk& walk, int q0, int buffer,
                                  bool back) {
  if (walk.whole) {
    issue_whole_tile<kReads, kHalf, NS, CH, kLanes>(p, place, walk, q0, buffer, back);
  } else {
    issue_runs<kReads>(p, place.shared, walk, q0, buffer, back);
  }
  copies_commit();
}
// The first of a walk, copied as any tile can be: less code.
template <Reads kReads>
__device__ inline void issue_first_tile(const BackwardParams& p, const Place& place, const Walk& walk, int q0,
                                        bool back) {
  issue_runs<kReads>(p, place.shared, walk, q0, 0, back);
  copies_commit();
}

// A staged tile, ready to be walked. Its slots hold the tokens in the order of the scan.
struct Tile {
  const float* rows;  // [kTile, {B, C}, padded_states]
  const float* low;   // [kTile, low_pitch]
  const float* x;     // [kTile, single]
  const float* dy;    // [kTile, single]
  // [kTile, twin]: {step[CH], input[CH]} of CH channels each; input = step * x, or x * log2(e) for zoh. With a shared
  // decay that in the step's place; in phase 1 {step[CH], decay[CH]}, and without a shared decay [kTile, single]:
  // steps.
  float* tokens;
  const int* pixels;  // [kTile]: -1 past the end
};

// write_floats to shared memory by one instruction: the compiler would rather make several of it where registers are
// short, whose lanes meet in the same banks. Without kOrdered other accesses may pass; __syncwarp() is between this and
// who reads it then.
template <int CH, bool kOrdered = true>
__device__ inline void store_together(float* to, const float (&v)[CH]) {
  const uint32_t at = shared_address(to);
  if constexpr (CH == 4) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
  } else if constexpr (CH == 2) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v[0]), "f"(v[1]));
  } else {
    static_assert(CH == 1, "one store");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v[0]));
  }
  if constexpr (kOrdered) asm volatile("" ::: "memory");
}

// Computes the steps of a staged tile and makes float of its activations; every lane of a channel takes its share of
// the tokens. Of Reads::all the steps are kept beside the tokens where these hold a decay: one for all states of a
// channel, which is the same for its lanes, and so computed once.
template <Reads kReads, bool kSharedDecay, bool kZoh, bool kHalf, int CH, int kLanes, int kDecays>
__device__ inline void compute_steps(const BackwardParams& p, const Place& place, const Walk& walk, const Tile& tile,
                                     const float (&a)[CH][kDecays], int q0, int buffer, bool back) {
  constexpr bool kPairs = kReads != Reads::c_dy || kSharedDecay;  // two values a channel in `tokens`
  constexpr int kTokens = tile_of(kReads), kShare = share_of(kTokens, kLanes);
  const Stage& stage = stage_of<kReads>(p);
  const Spacing<CH, kLanes> spacing(p);
  const int x_bytes = spacing.single * (kHalf ? 2 : 4);
  const int raw = kHalf ? 0 : buffer * kTokens * x_bytes;
  const char* const raw_x = place.shared + stage.x_at + raw;
  const char* const raw_dy = place.shared + stage.dy_at + raw;
  const char* const raw_delta = place.shared + stage.delta_at + raw;
  const int first = opaque(place.lane);
  const int token_pitch = kPairs ? spacing.twin : spacing.single;
  float* const tokens = tile.tokens + first * token_pitch + (kPairs ? place.c * 2 : place.c);
  float* const steps = reinterpret_cast<float*>(place.shared + p.steps_at) + first * spacing.single + place.c;
  float* const xs = const_cast<float*>(tile.x) + first * spacing.single + place.c;
  float* const dys = const_cast<float*>(tile.dy) + first * spacing.single + place.c;
  const float* const channels = reinterpret_cast<const float*>(place.shared + p.channels_at) + place.c;
  const float* const low = tile.low + first * p.low_pitch();
  float bias[CH];
  read_floats<CH>(channels + kBiasRow * p.block_channels, bias);
  // Tokens side by side: the weights are read once for them, and they hide each other's latency.
  constexpr int kSide = kShare < 4 ? kShare : 4;
#pragma unroll 1
  for (int i = 0; i < kShare; i += kSide) {
    if (kLanes > kTokens && first >= kTokens) break;
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
          read_floats<2>(low + (i + s) * kLanes * p.low_pitch() + r, pair);
#pragma unroll
          for (int c = 0; c < CH; ++c) step[s][c] = fmaf(pair[1], w[1][c], fmaf(pair[0], w[0][c], step[s][c]));
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSide; ++s) {
        read_activation<CH, kHalf>(p, raw_delta + (first + (i + s) * kLanes) * x_bytes, place.c, step[s]);
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
      const int t = (i + s) * kLanes;  // after the first
      if constexpr (!kPairs) {
        store_together<CH>(tokens + t * token_pitch, step[s]);
      } else if constexpr (kReads == Reads::c_dy) {
        float token[2 * CH];
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          token[c] = step[s][c];
          token[CH + c] = exp2_fast(step[s][c] * a[c][0]);
        }
        store_together<2 * CH>(tokens + t * token_pitch, token);
      } else {
        float token[2 * CH], x[CH];
        read_activation<CH, kHalf>(p, raw_x + (first + t) * x_bytes, place.c, x);
        if constexpr (kHalf) store_together<CH>(xs + t * spacing.single, x);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          token[c] = kSharedDecay ? exp2_fast(step[s][c] * a[c][0]) : step[s][c];
          token[CH + c] = (kZoh ? kLog2e : step[s][c]) * x[c];
        }
        store_together<2 * CH>(tokens + t * token_pitch, token);
      }
      if (kHalf && (kReads == Reads::c_dy || back)) {
        float dy[CH];
        read_activation<CH, kHalf>(p, raw_dy + (first + t) * x_bytes, place.c, dy);
        store_together<CH>(dys + t * spacing.single, dy);
      }
      if (kReads == Reads::all && kSharedDecay && back) store_together<CH>(steps + t * spacing.single, step[s]);
    }
  }
}

// Waits for the tile in `buffer` and prepares it. Starts the next tile's copies by `issue_next()`.
template <Reads kReads, bool kSharedDecay, bool kZoh, bool kHalf, int NS, int CH, int kLanes, int kDecays, typename F>
__device__ inline Tile prepare_tile(const BackwardParams& p, const Place& place, const Walk& walk,
                                    const float (&a)[CH][kDecays], int q0, int buffer, bool back, F&& issue_next) {
  constexpr int kTokens = tile_of(kReads);
  const Stage& stage = stage_of<kReads>(p);
  const int single = Spacing<CH, kLanes>(p).single;
  char* const shared = place.shared;
  auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };
  Tile tile;
  tile.tokens = floats(stage.token_at);
  tile.pixels = reinterpret_cast<const int*>(shared + stage.pixels_at) + buffer * kTokens;
  copies_wait();
  __syncthreads();  // the tile is there; nobody needs the one before
  if constexpr (kHalf) {
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
    if (NS == 1 && p.pairs) {
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
    compute_steps<kReads, kSharedDecay, kZoh, true, CH, kLanes>(p, place, walk, tile, a, q0, buffer, back);
    __syncthreads();  // all is decoded
    issue_next();
  } else {
    issue_next();
    tile.rows = floats(stage.rows_at) + buffer * kTokens * p.pitch;
    tile.x = floats(stage.x_at) + buffer * kTokens * single;
    tile.dy = floats(stage.dy_at) + buffer * kTokens * single;
    tile.low = tile.rows + kTokens * 2 * p.padded_states;
    compute_steps<kReads, kSharedDecay, kZoh, false, CH, kLanes>(p, place, walk, tile, a, q0, buffer, back);
    __syncwarp();  // the lanes of a channel are in one warp
  }
  return tile;
}

// Of a thread's channels: a, and what zero-order hold needs of it.
template <int NS, int CH, bool kSharedDecay, bool kZoh>
struct Decays {
  static_assert(!(kSharedDecay && kZoh), "with zero-order hold every state has a decay");
  static constexpr int kCount = kSharedDecay ? 1 : NS;
  float a[CH][kCount], inverse[CH][kZoh ? kCount : 1];
  __device__ Decays(const BackwardParams& p, const Place& place, const Track& track) {
    load_decays<NS, CH, kSharedDecay>(p, track, track.first_d + place.c, place.lane, a);
    if constexpr (kZoh) invert_decays(a, inverse);
  }
};

template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ inline void advance(const BackwardParams& p, const Tile& tile, const Place& place,
                               const Decays<NS, CH, kSharedDecay, kZoh>& decays, int t, float (&h)[CH][NS]) {
  float token[2 * CH], b[NS];
  read_floats<2 * CH>(tile.tokens + t * Spacing<CH, kLanes>(p).twin + place.c * 2, token);
  read_floats<NS>(tile.rows + t * 2 * padded_states_of(NS, kLanes) + place.lane * NS, b);
#pragma unroll
  for (int c = 0; c < CH; ++c) {
#pragma unroll
    for (int j = 0; j < NS; ++j) {
      float decay = token[c], input = token[CH + c] * b[j];
      if constexpr (!kSharedDecay) {
        const float v = token[c] * decays.a[c][j];
        decay = exp2_fast(v);
        if constexpr (kZoh) input *= zoh_weight(token[c] * kLn2, v, decay, decays.inverse[c][j]);
      }
      h[c][j] = fmaf(decay, h[c][j], input);
    }
  }
}

// Phase 1: the gradient that a chunk hands to the chunk scanned before it, from a zero start, and its sum of steps.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh, bool kHalf>
__device__ void summarize_chunk(const BackwardParams& p, const Place& place, const Track& track, int chunk,
                                float (&g)[CH][NS], float (&step_sum)[CH]) {
  const Walk& walk = begin_walk<Reads::c_dy>(p, place, track, chunk, Contribution{});
  float a[CH][kSharedDecay ? 1 : NS];
  load_decays<NS, CH, kSharedDecay>(p, track, track.first_d + place.c, place.lane, a);
  const Spacing<CH, kLanes> spacing(p);
  constexpr int kPadded = padded_states_of(NS, kLanes);
  const int begin = walk.begin, tiles = (walk.end - begin + kWideTile - 1) / kWideTile;
  auto first_token = [&](int tile) { return begin + (track.reversed ? tile : tiles - 1 - tile) * kWideTile; };
  issue_first_tile<Reads::c_dy>(p, place, walk, first_token(0), true);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const Tile tile = prepare_tile<Reads::c_dy, kSharedDecay, kZoh, kHalf, NS, CH, kLanes>(
        p, place, walk, a, first_token(i), i & 1, true, [&] {
          if (i + 1 < tiles)
            issue_tile<Reads::c_dy, kHalf, NS, CH, kLanes>(p, place, walk, first_token(i + 1), ~i & 1, true);
        });
#pragma unroll 4
    for (int t = kWideTile - 1; t >= 0; --t) {
      float token[kSharedDecay ? 2 * CH : CH], dy[CH], c_row[NS];
      if constexpr (kSharedDecay) {
        read_floats<2 * CH>(tile.tokens + t * spacing.twin + place.c * 2, token);
      } else {
        read_floats<CH>(tile.tokens + t * spacing.single + place.c, token);
      }
      read_floats<CH>(tile.dy + t * spacing.single + place.c, dy);
      read_floats<NS>(tile.rows + (2 * t + 1) * kPadded + place.lane * NS, c_row);
#pragma unroll
      for (int c = 0; c < CH; ++c) {
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          const float decay = kSharedDecay ? token[CH + c] : exp2_fast(token[c] * a[c][n]);
          g[c][n] = decay * fmaf(c_row[n], dy[c], g[c][n]);
        }
        step_sum[c] += token[c];
      }
    }
  }
}

// Sums v over the threads whose places in the warp differ in a bit from `first` up to below `last`. While one holds
// more than one value, each step also halves them: the thread whose bit is set keeps the upper half. Returns the index
// of v[0] among the values it started with; duplicates (more threads than values) hold the same sums.
template <int kLanes, int NV>
__device__ inline int sum_over_places(float (&v)[NV], int first, int last, int place) {
  int base = 0;
  int off = first;
#pragma unroll
  for (int level = 1; level <= 5; ++level) {
    const int count = NV >> level;
    if (count > 0 && off < last) {
      const bool upper = place & off;
#pragma unroll
      for (int i = 0; i < NV / 2; ++i) {
        if (i >= count) break;
        const float sent = upper ? v[i] : v[i + count], kept = upper ? v[i + count] : v[i];
        v[i] = kept + from_place(sent, off, kLanes);
      }
      base += upper ? count : 0;
      off *= 2;
    }
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (off < last) v[0] += from_place(v[0], off, kLanes);
    off *= 2;
  }
  return base;
}

// Sums a batch of tokens' values of the states over the channels of a warp: `scratch` holds [kBatch, place in the warp,
// NS] with kBatchPad values between tokens, the sums go to rows `to`, pitch apart.
constexpr int kBatchPad = 8;
template <int NS, int kLanes>
__device__ inline void sum_batch(const BackwardParams& p, const float* scratch, int lane_id, float* to) {
  static_assert(NS % 4 == 0, "pairs of states");
  __syncwarp();
  if constexpr (kLanes > kBatch) {  // a lane takes four states of a token at a time
    constexpr int kQuads = kLanes * NS / 4;
#pragma unroll
    for (int i = 0; i < kQuads * kBatch / 32; ++i) {
      const int item = lane_id + 32 * i, t = item / kQuads, quad = item % kQuads;
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
  } else {  // a pair for each lane of the warp, or every kParts-th of a pair's terms
    static_assert(NS == 4, "one pair for each");
    constexpr int kParts = kBatch / kLanes, kPairs = NS * kLanes / 2;
    const int t = lane_id % kBatch, pair = lane_id / kBatch % kPairs, part = lane_id / kBatch / kPairs;
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
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, off * kBatch * kPairs);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, off * kBatch * kPairs);
    }
    if (part == 0) store_together<2, false>(to + t * p.pitch + pair * 2, {sum.x, sum.y});
  }
  __syncwarp();
}

// Two neighbouring elements of an output of a 16-bit type, at an even element.
__device__ inline void store_pair(void* to, int64_t i, float2 v, DType dtype) {
  *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + i) = encode_two(v, dtype);
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
template <bool kHalf>
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
    const bool rounds = kHalf && quad.last;  // float rows end where they are summed
    if (!p.paired) {
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
      continue;
    }
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
        store_pair(p.dproj, to + j, make_float2(v[j], v[j + 1]), p.dtype);
      } else {
        *reinterpret_cast<float2*>(p.dproj_sum + to + j) = make_float2(v[j], v[j + 1]);
      }
    }
  }
}

// Zeros for the rows of B and C that nobody reads. One grid's work.
__device__ inline void clear_unread(const BackwardParams& p) {
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
  const int64_t rows = int64_t{p.batch} * p.tokens * p.paths, first = p.source(0) == 0 ? rows : 0;
#pragma unroll 1
  for (int64_t row = first + warp; row < first + rows; row += warps) {
    const int64_t at = row * p.row() + p.rank;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < 2 * p.states; i += 32) {
      if (p.splits == 1) {
        store_as(p.dproj, at + i, 0.f, p);
        continue;
      }
#pragma unroll 1
      for (int split = 0; split < p.splits; ++split) p.dproj_sum[split * p.dproj_copy + at + i] = 0.f;
    }
  }
}

// What the paths before left in dx_sum of the thread's channels.
template <int CH>
__device__ inline void read_dx(const BackwardParams& p, int64_t from, float (&dx)[CH]) {
  if constexpr (CH == 2) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(p.dx_sum + from));
    dx[0] = pair.x;
    dx[1] = pair.y;
  } else {
    dx[0] = __ldcg(p.dx_sum + from);
  }
}

// dx of the thread's tokens and CH channels, all of which exist. Where it leaves in a 16-bit type it comes with what
// read_dx found. `c` is the first channel within the block.
template <int CH, int kShare, bool kHalf>
__device__ inline void write_dx(const BackwardParams& p, const Walk& walk, int c, const int (&pixel)[kShare],
                                const float (&dx)[kShare][CH]) {
  const int64_t at = walk.dx + c;
  const int stride = walk.dx_pixel;
  if (kHalf && walk.part.last_dx) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (pixel[i] < 0) continue;
      if constexpr (CH == 2) {
        store_pair(p.dx, at_pixel(at, pixel[i], stride), make_float2(dx[i][0], dx[i][1]), p.dtype);
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
  const float near = step * polynomial(-step, 1.f, 0.5f, 1.f / 6.f, 1.f / 24.f, 1.f / 120.f, 1.f / 720.f, 1.f / 5040.f);
  return step < 0.5f ? near : 1.f - exp2_fast(-step * kLog2e);
}

// The sums over the states of a token's channels, d step through the decay over ln 2 and dh * B (zoh: d step in full
// over ln 2, and ln 2 * dx), become the gradients of the raw steps, and dx but for the skip. `step` holds the steps in
// front.
template <int CH, bool kZoh, int kCount>
__device__ inline void finish_sums(const BackwardParams& p, const float (&step)[kCount], const float (&x)[CH],
                                   float (&sum)[2 * CH]) {
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    const float dstep = kZoh ? sum[c] * kLn2 : fmaf(x[c], sum[CH + c], sum[c] * kLn2);
    sum[c] = p.softplus ? dstep * slope_of(step[c]) : dstep;
    sum[CH + c] *= kZoh ? kLog2e : step[c];
  }
}

// Tokens of a tile whose sums a lane keeps.
constexpr int own_tokens(int lanes) { return owns_tokens(lanes) ? share_of(kTile, lanes) : 1; }

// After a tile, the thread's share of its tokens: dx to memory, the low-rank part summed over the warp's channels, and
// the sums over tokens of the parameter gradients; that of A here only with a shared decay.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh, bool kHalf>
__device__ inline void finish_tokens(const BackwardParams& p, const Place& place, const Walk& walk, const Tile& tile,
                                     const Decays<NS, CH, kSharedDecay, kZoh>& decays,
                                     const float (&own)[own_tokens(kLanes)][2 * CH],
                                     float (&da)[CH][kSharedDecay ? 1 : NS]) {
  const Contribution part = walk.part;
  const Spacing<CH, kLanes> spacing(p);
  constexpr int kShare = share_of(kTile, kLanes);
  constexpr bool kAllHave = kLanes <= kTile;  // every lane has as many tokens
  const int warp = threadIdx.x / 32, in_warp = place_in_warp(opaque(threadIdx.x % 32), kLanes);
  const float* const steps = reinterpret_cast<const float*>(place.shared + p.steps_at) + place.c;
  const float* const channels = reinterpret_cast<const float*>(place.shared + p.channels_at) + place.c;
  const int first = opaque(first_own_token<kLanes>(place.lane));
  const int exist = p.channels - walk.track.first_d - place.c;
  float draw[kShare][CH] = {}, dx[kShare][CH] = {}, skip[CH], dbias[CH], dskip[CH];
  int pixel[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int t = first + i * kLanes;
    pixel[i] = !kAllHave && t >= kTile ? -1 : tile.pixels[t];
  }
  const bool together = CH == 1 || p.channels % 2 == 0, writes = exist >= (together ? CH : 1);  // all channels or none
  const bool reads_dx = kHalf && part.last_dx && !part.first_dx;
  if (reads_dx && together && writes) {  // all tokens at once: this is far away
    const int64_t at = walk.dx + place.c;
    const int stride = walk.dx_pixel;
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (pixel[i] >= 0) read_dx<CH>(p, at_pixel(at, pixel[i], stride), dx[i]);
  }
  const int sums_row = blockDim.x * CH;
  float* sums = reinterpret_cast<float*>(place.shared + p.channel_sums_at) + threadIdx.x * CH;
  read_floats<CH>(sums + kBiasRow * sums_row, dbias);
  read_floats<CH>(sums + kSkipRow * sums_row, dskip);
  read_floats<CH>(channels + kSkipRow * p.block_channels, skip);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int t = first + i * kLanes;
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
    if constexpr (kLanes != 1 || kSharedDecay) {
      float step[CH];
      read_floats<CH>(kSharedDecay ? steps + at : token, step);
      if constexpr (kSharedDecay) {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          da[c][0] = fmaf(step[c], sum[c], da[c][0]);
          sum[c] *= decays.a[c][0];
        }
      }
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
  if (together && writes) write_dx<CH, kShare, kHalf>(p, walk, place.c, pixel, dx);
  if ((!together || p.ddelta != nullptr) && writes) {  // one by one, from where the sums may be: this is seldom needed
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      float values[2 * CH];
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        values[c] = draw[i][c];
        values[CH + c] = dx[i][c];
      }
      if (kAllHave || first + i * kLanes < kTile)
        write_floats<2 * CH>(tile.tokens + (first + i * kLanes) * spacing.twin + place.c * 2, values);
    }
#pragma unroll 1
    for (int i = 0; i < kShare * CH; ++i) {
      const int c = i % CH, t = first + i / CH * kLanes;
      if (c >= exist || (!kAllHave && t >= kTile) || tile.pixels[t] < 0) continue;
      const float* const values = tile.tokens + t * spacing.twin + place.c * 2 + c;
      const int at[1] = {tile.pixels[t]};
      if (p.ddelta != nullptr)
        store_as(p.ddelta, at_pixel(walk.ddelta + place.c + c, at[0], walk.ddelta_pixel), values[0], p);
      if (!together) {
        float one[1][1] = {};
        if (reads_dx) read_dx<1>(p, at_pixel(walk.dx + place.c + c, at[0], walk.dx_pixel), one[0]);
        one[0][0] += values[CH];
        write_dx<1, 1, kHalf>(p, walk, place.c + c, at, one);
      }
    }
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
      if (!kAllHave && first + i * kLanes >= kTile) break;
      float value[2];
      read_floats<2>(values + i * kLanes * p.low_pitch(), value);
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
    const int base = sum_over_places<kLanes>(low, kLanes, 32, in_warp);
    constexpr int kHeld = 2 * kShare * kLanes > 32 ? 2 * kShare * kLanes / 32 : 1;
#pragma unroll
    for (int v = 0; v < 2 * kShare; ++v) {
      const int k = (base + v) / kShare, t = first + (base + v) % kShare * kLanes;
      if (v < kHeld && in_warp < 2 * kShare * kLanes && (kAllHave || t < kTile)) warp_sums[t * p.pitch + k] = low[v];
    }
  }
}

// The memory of a thread's warp.
template <int NS, int kLanes>
struct WarpMemory {
  static constexpr int kPitch = 32 * NS + kBatchPad;  // between the tokens of a batch
  int lane_id, in_warp;                               // the thread, and its place
  float *sums, *scratch;                              // rows of dproj; values to be summed over the warp
  __device__ WarpMemory(const BackwardParams& p, const Place& place)
      : lane_id(threadIdx.x % 32), in_warp(place_in_warp(lane_id, kLanes)) {
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
  const WarpMemory<NS, kLanes>& warp;
  const int column;
  float single[NS == 1 ? kTile : 1];

  // Token j of the tile; `complete`: it is the last of its batch to come.
  __device__ void add(int j, const float (&v)[NS], bool complete) {
    if constexpr (NS == 1) {
      single[j] = v[0];
    } else {
      float* const to = warp.scratch + j % kBatch * WarpMemory<NS, kLanes>::kPitch + warp.in_warp * NS;
#pragma unroll
      for (int n = 0; n < NS; n += 4) store_together<4, false>(to + n, {v[n], v[n + 1], v[n + 2], v[n + 3]});
      if (complete)
        sum_batch<NS, kLanes>(p, warp.scratch, warp.lane_id, warp.sums + (j - j % kBatch) * p.pitch + column);
    }
  }
  __device__ void finish() {
    if constexpr (NS == 1) {
      const int t = sum_over_places<1>(single, 1, 32, warp.in_warp);
      if (warp.lane_id < kTile) warp.sums[t * p.pitch + column] = single[0];
    }
  }
};

// The sums over a channel's lanes, for the tokens that are this lane's; `scratch` holds [kBatch, place in the warp,
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
__device__ __forceinline__ void rebuild_tile(const BackwardParams& p, const Place& place,
                                             const WarpMemory<NS, kLanes>& warp, const Tile& tile,
                                             const Decays<NS, CH, kSharedDecay, kZoh>& decays, float (&h)[CH][NS],
                                             float (&state)[kTile][CH][NS]) {
  const Spacing<CH, kLanes> spacing(p);
  StateSums<NS, kLanes> dc_sums = {p, warp, padded_states_of(NS, kLanes)};
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const int t = spacing.slot(j);
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int n = 0; n < NS; ++n) state[j][c][n] = h[c][n];
    advance<NS, CH, kLanes, kSharedDecay, kZoh>(p, tile, place, decays, t, h);
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
// states, as finish_sums takes them, go to `own` or to the place of the step and the input; with a shared decay those
// of g * state and dh * B. `da`: without one; zoh: times ln 2.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh>
__device__ __forceinline__ void reverse_tile(const BackwardParams& p, const Place& place,
                                             const WarpMemory<NS, kLanes>& warp, const Tile& tile,
                                             const Decays<NS, CH, kSharedDecay, kZoh>& decays,
                                             const float (&state)[kTile][CH][NS], float (&g)[CH][NS],
                                             float (&own)[own_tokens(kLanes)][2 * CH],
                                             float (&da)[CH][kSharedDecay ? 1 : NS]) {
  constexpr bool kOwned = owns_tokens(kLanes);
  static_assert(!kOwned || kSumPitch<CH> <= WarpMemory<NS, kLanes>::kPitch, "in the same memory");
  const Spacing<CH, kLanes> spacing(p);
  constexpr int kPadded = padded_states_of(NS, kLanes);
  StateSums<NS, kLanes> db_sums = {p, warp, 0};
  float batch_sums[kBatch][2 * CH];
#pragma unroll
  for (int j = kTile - 1; j >= 0; --j) {
    const int t = spacing.slot(j);
    const float* row = tile.rows + 2 * t * kPadded + place.lane * NS;
    float token[2 * CH], dy[CH], b[NS], c_row[NS], db[NS] = {};
    float sum[2 * CH] = {};  // over the thread's states
    read_floats<2 * CH>(tile.tokens + t * spacing.twin + place.c * 2, token);
    read_floats<CH>(tile.dy + t * spacing.single + place.c, dy);
    read_floats<NS>(row, b);
    read_floats<NS>(row + kPadded, c_row);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        const float dh = fmaf(c_row[n], dy[c], g[c][n]);
        if constexpr (kSharedDecay) {
          g[c][n] = token[c] * dh;
          sum[c] = fmaf(g[c][n], state[j][c][n], sum[c]);
          sum[CH + c] = fmaf(b[n], dh, sum[CH + c]);
          db[n] = fmaf(token[CH + c], dh, db[n]);
        } else {
          const float a_n = decays.a[c][n], v = token[c] * a_n, e = exp2_fast(v);
          g[c][n] = e * dh;
          const float dz = g[c][n] * state[j][c][n];
          if constexpr (kZoh) {
            const float sigma = token[c] * kLn2, slope = zoh_slope(sigma, v, e, decays.inverse[c][n]);
            const float weight = fmaf(-a_n, slope, sigma * e), dinput = dh * b[n], dbbar = dinput * token[CH + c];
            da[c][n] += fmaf(dbbar, slope, sigma * dz);
            sum[c] += fmaf(dbbar, e, a_n * dz);
            sum[CH + c] = fmaf(weight, dinput, sum[CH + c]);
            db[n] = fmaf(weight * token[CH + c], dh, db[n]);
          } else {
            da[c][n] = fmaf(token[c], dz, da[c][n]);
            sum[c] = fmaf(a_n, dz, sum[c]);
            sum[CH + c] = fmaf(b[n], dh, sum[CH + c]);
            db[n] = fmaf(token[CH + c], dh, db[n]);
          }
        }
      }
    }
    db_sums.add(j, db, j % kBatch == 0);
    if constexpr (kOwned) {
#pragma unroll
      for (int v = 0; v < 2 * CH; ++v) batch_sums[j % kBatch][v] = sum[v];
      if (j % kBatch == 0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          store_together<2 * CH, false>(warp.scratch + i * kSumPitch<CH> + warp.in_warp * 2 * CH, batch_sums[i]);
        __syncwarp();
        const float* const from = warp.scratch + (warp.in_warp - place.lane) * 2 * CH;
        if constexpr (kLanes <= kBatch) {
#pragma unroll
          for (int i = 0; i < kBatch; i += kLanes)
            own_sums<CH, kLanes>(from + (place.lane + i) * kSumPitch<CH>, 0, own[(j + i) / kLanes]);
        } else {  // kParts lanes share a token; each adds as many lanes' values, from different banks
          constexpr int kParts = kLanes / kBatch;
          const int part = place.lane % kParts, channel = warp.in_warp / kLanes % 2;
          const int order = kLanes == 8 ? 2 * channel : (part & 2) ^ channel;
          float part_sum[2 * CH];
          own_sums<CH, kBatch>(from + place.lane / kParts * kSumPitch<CH> + part * kBatch * 2 * CH, order, part_sum);
#pragma unroll
          for (int v = 0; v < 2 * CH; ++v) {
#pragma unroll
            for (int off = 1; off < kParts; off *= 2) part_sum[v] += from_place(part_sum[v], off, kLanes);
            if (part == j / kBatch) own[0][v] = part_sum[v];
          }
        }
        __syncwarp();
      }
    } else {
      if constexpr (!kSharedDecay) {  // at once what finish_tokens leaves to do otherwise
        float x[CH];
        read_floats<CH>(tile.x + t * spacing.single + place.c, x);
        finish_sums<CH, kZoh>(p, token, x, sum);
      }
      // In the place of the step and the input, which are not needed any more.
      write_floats<2 * CH>(tile.tokens + t * spacing.twin + place.c * 2, sum);
    }
  }
  db_sums.finish();
  __syncwarp();
}

// This chunk's part of the parameter gradients.
template <int NS, int CH, int kLanes, bool kSharedDecay>
__device__ inline void write_parameters(const BackwardParams& p, const Place& place, const Walk& walk,
                                        const float (&da)[CH][kSharedDecay ? 1 : NS]) {
  const Track track = walk.track;
  const int d = track.first_d + place.c;
  const float* const sums = reinterpret_cast<const float*>(place.shared + p.channel_sums_at) + threadIdx.x * CH;
  const int64_t mkd = track.mk(p) * p.channels + d;
  float* const part = p.parts + (int64_t{track.b} * p.chunks + walk.chunk) * p.part;
  if (threadIdx.x < p.part - p.used) part[p.used + threadIdx.x] = 0.f;
  auto over_lanes = [&](float v) {
    for (int off = 1; off < kLanes; off *= 2) v += from_place(v, off, kLanes);
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
    if (kSharedDecay || p.shared_decay) {
      float sum = da[c][0];
#pragma unroll
      for (int j = 1; j < (kSharedDecay ? 1 : NS); ++j) sum += da[c][j];
      sum = over_lanes(sum);
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

// Which tile a walk of phase 3 visits. Chunks begin at any tile, pieces where states were saved; with a state saved at
// every tile a chunk is one piece. A piece is taken along the scan up to its last tile in the chunk, which leaves the
// state at the entry of each, and then back to its first: both in one loop, as its code should stay in the instruction
// cache.
template <bool kTilesSaved>
struct Visit {
  int piece, begin, tiles;  // the piece's number, its first token on the axis, and its tiles
  int first, last, tile;    // those of the chunk, and the one visited, in the order of the scan
  bool back;

  __device__ Visit(const BackwardParams& p, const Walk& walk) {
    enter(p, walk, walk.track.reversed ? walk.begin / kPiece : (walk.end - 1) / kPiece);
  }
  __device__ void enter(const BackwardParams& p, const Walk& walk, int number) {
    piece = number;
    begin = kTilesSaved ? walk.begin : piece * kPiece;
    const int end = kTilesSaved ? walk.end : min(begin + kPiece, p.tokens);
    tiles = (end - begin + kTile - 1) / kTile;
    const int before = max(walk.begin - begin, 0) / kTile, after = (max(end - walk.end, 0) + kTile - 1) / kTile;
    first = walk.track.reversed ? after : before;
    last = tiles - 1 - (walk.track.reversed ? before : after);
    tile = kTilesSaved ? last : 0;
    back = tile == last;
  }
  // False where the walk ends.
  __device__ bool advance(const BackwardParams& p, const Walk& walk) {
    if (!back) {
      back = ++tile == last;
    } else if (tile > first) {
      --tile;
    } else if (kTilesSaved || (walk.track.reversed ? begin + kPiece >= walk.end : begin <= walk.begin)) {
      return false;
    } else {
      enter(p, walk, walk.track.reversed ? piece + 1 : piece - 1);
    }
    return true;
  }
  // The state with which the piece is entered is needed.
  __device__ bool enters() const { return kTilesSaved ? tile == last : tile == 0 && back == (last == 0); }
  __device__ int first_token(const Walk& walk) const {
    return begin + (walk.track.reversed ? tiles - 1 - tile : tile) * kTile;
  }
};

// Phase 3: one chunk of one path, against the scan. g is the gradient that the chunk scanned next hands over.
template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh, bool kHalf>
__device__ void walk_back(const BackwardParams& p, const Place& place, const Walk& walk, float (&g)[CH][NS]) {
  const Decays<NS, CH, kSharedDecay, kZoh> decays(p, place, walk.track);
  float da[CH][kSharedDecay ? 1 : NS] = {};
  // The gradients of what is staged of the channels, of the thread's share of the tokens: rows like theirs.
  float* const channel_sums = reinterpret_cast<float*>(place.shared + p.channel_sums_at);
  for (int i = 0; i < channel_rows(p.rank) * CH; ++i) channel_sums[i * blockDim.x + threadIdx.x] = 0.f;
  lay_out_quads(p, place, walk);
  const History<NS, CH> history(p, place);
  const WarpMemory<NS, kLanes> warp(p, place);
  constexpr bool kTilesSaved = NS == 1;
  const int64_t first_saved = walk.track.mbk(p) * p.pieces();
  auto load_saved = [&](int q0, float (&h)[CH][NS]) {
    const int64_t piece = first_saved + (q0 >> p.checkpoint_shift);
    load_state<NS, CH>(p, p.saved_states + piece * p.states * p.channels, walk.track.first_d + place.c, place.lane, h);
  };

  Visit<kTilesSaved> visit(p, walk);
  float h[CH][NS] = {};
  issue_first_tile<Reads::all>(p, place, walk, visit.first_token(walk), visit.back);
#pragma unroll 1
  for (int buffer = 0;; buffer ^= 1) {
    Visit<kTilesSaved> next = visit;
    const bool more = next.advance(p, walk);
    if (visit.enters()) load_saved(visit.first_token(walk), h);
    const Tile tile = prepare_tile<Reads::all, kSharedDecay, kZoh, kHalf, NS, CH, kLanes>(
        p, place, walk, decays.a, visit.first_token(walk), buffer, visit.back, [&] {
          if (more)
            issue_tile<Reads::all, kHalf, NS, CH, kLanes>(p, place, walk, next.first_token(walk), buffer ^ 1,
                                                          next.back);
        });
    if (!visit.back) {
      if (visit.tile >= visit.first) history.save(visit.tile, h);
#pragma unroll 4
      for (int j = 0; j < kTile; ++j) advance<NS, CH, kLanes, kSharedDecay, kZoh>(p, tile, place, decays, j, h);
    } else {
      float entry[kTilesSaved ? CH : 1][NS] = {};  // the state with which the tile before this one is entered
      if constexpr (kTilesSaved) {
        if (more) load_saved(next.first_token(walk), entry);
      } else {
        if (visit.tile < visit.last) history.load(visit.tile, h);
      }
      float state[kTile][CH][NS], own[own_tokens(kLanes)][2 * CH];
      rebuild_tile<NS, CH, kLanes, kSharedDecay, kZoh>(p, place, warp, tile, decays, h, state);
      reverse_tile<NS, CH, kLanes, kSharedDecay, kZoh>(p, place, warp, tile, decays, state, g, own, da);
      finish_tokens<NS, CH, kLanes, kSharedDecay, kZoh, kHalf>(p, place, walk, tile, decays, own, da);
      __syncthreads();
      write_dproj<kHalf>(p, place, walk, tile);
      if constexpr (kTilesSaved) {
#pragma unroll
        for (int c = 0; c < CH; ++c) h[c][0] = entry[c][0];
      }
    }
    if (!more) break;
    visit = next;
  }
  if constexpr (kZoh) {
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int n = 0; n < NS; ++n) da[c][n] *= kLog2e;
  }
  write_parameters<NS, CH, kLanes, kSharedDecay>(p, place, walk, da);
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
          make_uint2(encode_two(make_float2(sum.x, sum.y), p.dtype), encode_two(make_float2(sum.z, sum.w), p.dtype));
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

template <int NS, int CH, int kLanes, bool kSharedDecay, bool kZoh, bool kHalf>
__global__ void __launch_bounds__(kMaxThreads, min_blocks(NS))
    ss2d_backward_kernel(const __grid_constant__ BackwardParams p) {
  extern __shared__ float4 shared_base[];
  const int thread = static_cast<int>(threadIdx.x), in_block = thread / 32 * 32 + place_in_warp(thread % 32, kLanes);
  const Place place = {in_block % kLanes, in_block / kLanes * CH, reinterpret_cast<char*>(shared_base)};
  const int64_t plane = int64_t{p.states} * p.channels;

  // Zeros where staged rows are padded: B and C of states that do not exist.
  auto clear = [&] {
    __syncthreads();
    clear_shared(place.shared, p.history_at, threadIdx.x, blockDim.x);
    __syncthreads();
  };
  clear();
  if (p.shared_source) clear_unread(p);
  if (p.chunks > 1) {
    const int summaries = p.chunks - 1, tasks = p.modalities * p.batch * p.groups * p.paths * summaries;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
      const int nth = task / summaries, sequence = nth / p.paths;
      const Track track(p, sequence / p.groups, nth - sequence * p.paths, sequence % p.groups);
      const int chunk = task - nth * summaries + (track.reversed ? 0 : 1);  // nothing comes from the last
      const int d = track.first_d + place.c;
      float g[CH][NS] = {}, steps[CH] = {};
      summarize_chunk<NS, CH, kLanes, kSharedDecay, kZoh, kHalf>(p, place, track, chunk, g, steps);
      const int64_t at = track.mbk(p) * p.chunks + chunk;
      store_state<NS, CH>(p, p.chunk_state + at * plane, d, place.lane, g);
      if (place.lane == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (d + c < p.channels) p.chunk_steps[at * p.channels + d + c] = steps[c];
      }
    }
    cooperative_groups::this_grid().sync();
    prefix_chunks(p, true, reinterpret_cast<float*>(shared_base));
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
      const Contribution part = {
          in_split == 0,          last && p.splits == 1,           turn == 0, last_turn && p.splits == 1,
          i == 0 || p.x_per_path, i == p.paths - 1 || p.x_per_path};
      const int next = last_turn ? (task + gridDim.x) * p.turns : at + 1;
      const Walk& walk = begin_walk<Reads::all>(p, place, track, chunk, part);
      if (threadIdx.x == 0) const_cast<Walk&>(walk).next = next;
      walk_back<NS, CH, kLanes, kSharedDecay, kZoh, kHalf>(p, place, walk, g);
      at = walk.next;
    }
  }
  add_parts(p, shared_base);
  const int64_t tokens = int64_t{p.modalities} * p.batch * p.tokens;
  if (p.splits > 1) add_copies(p, p.dproj, p.dproj_sum, p.splits, p.dproj_copy, tokens * p.paths * p.row());
  if (p.dx_apart) add_copies(p, p.dx, p.dx_sum, p.paths, p.dx_copy, tokens * p.channels);
}

using BackwardKernel = void (*)(BackwardParams);

// A decay is shared, and tokens hold it. With zero-order hold the states of a channel have one each all the same.
inline bool holds_decays(const SS2DProblem& problem) {
  return has_shared_decay(problem) && problem.discretization == Discretization::euler;
}

template <bool kSharedDecay, bool kZoh, bool kHalf>
BackwardKernel kernel_with(const Layout& layout) {
  if (layout.states_per_thread == 8) return ss2d_backward_kernel<8, 1, 32, kSharedDecay, kZoh, kHalf>;
  if constexpr (!kSharedDecay && !kZoh) {
    if (layout.states_per_thread == 1) return ss2d_backward_kernel<1, 2, 1, false, false, kHalf>;
  }
  switch (layout.state_lanes) {
    case 1:
      return ss2d_backward_kernel<4, 2, 1, kSharedDecay, kZoh, kHalf>;
    case 2:
      return ss2d_backward_kernel<4, 2, 2, kSharedDecay, kZoh, kHalf>;
    case 4:
      return ss2d_backward_kernel<4, 2, 4, kSharedDecay, kZoh, kHalf>;
    case 8:
      return ss2d_backward_kernel<4, 2, 8, kSharedDecay, kZoh, kHalf>;
    case 16:
      return ss2d_backward_kernel<4, 2, 16, kSharedDecay, kZoh, kHalf>;
    default:
      return ss2d_backward_kernel<4, 2, 32, kSharedDecay, kZoh, kHalf>;
  }
}
template <bool kHalf>
BackwardKernel kernel_for(const SS2DProblem& problem, const Layout& layout) {
  if (holds_decays(problem)) return kernel_with<true, false, kHalf>(layout);
  return problem.discretization == Discretization::zoh ? kernel_with<false, true, kHalf>(layout)
                                                       : kernel_with<false, false, kHalf>(layout);
}

}  // namespace
}  // namespace cuda
}  // namespace diffmf
