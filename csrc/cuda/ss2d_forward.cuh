// What the two forward scans of ss2d share, ss2d_recurrence.cuh and ss2d_matrix.cuh: parameters, staging of a tile of
// tokens, and adding to y. Part of ss2d_forward.cu alone, hence the unnamed namespace.
#pragma once

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

// Warps of a block, of which a multiprocessor holds one: at most 168 registers a thread, or 128. Several smaller blocks
// would not advance evenly, and the last one of them would run alone.
constexpr int most_warps(bool few_registers) { return few_registers ? 16 : 12; }
constexpr int kTile = 8;                 // tokens staged at a time; divides what is between two saved states
constexpr int kTokenLanes = 32 / kTile;  // lanes that copy one token of a tile: fewer would copy less of a row at once
static_assert(checkpoint_of(1) % kTile == 0 && checkpoint_of(2) % kTile == 0, "tiles must not straddle pieces");

struct Round {
  int path[2];  // of the two warps of a pair; path[1] is -1 when the round has one path, and they take two chunks
};

struct ForwardParams : Params {
  void* y;              // [M, B, L, D]
  float* sum;           // [M, B, L, D], y while paths are still missing; y itself when it is float
  int sum_granule;      // bytes of a row of `sum` that can be copied at a time
  int channel_shift;    // log2(block_channels)
  float* saved_states;  // [M, B, K, pieces, N, D] or null
  float* last_state;    // [M, B, K, N, D] or null
  Round round[kMaxPaths];
  int rounds;
  // All of a thread's states and of a block's channels exist, and rows can be copied in pieces known at compile time.
  bool whole;
  // Shared memory of a warp, offsets in bytes. Two tiles of rows and activations are in flight.
  int bases_at, offsets_at, rows_at, decoded_at, x_at, sum_at, delta_at, steps_at, channels_at, warp_bytes;
  int x_pitch;  // values from a staged token's activations to the next one's
};

// Where a thread stands.
struct Seat {
  int lane, c;                // of the recurrence: lane of the channel, first channel within the block of channels
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
__device__ inline void copy_words(uint32_t to, const char* from, int bytes, int granule, int lane) {
  if (granule == 16) {
    copy_granules<16>(to, from, bytes, lane);
  } else if (granule == 8) {
    copy_granules<8>(to, from, bytes, lane);
  } else {
    copy_granules<4>(to, from, bytes, lane);
  }
}
__device__ inline void copy_row(void* to, const char* from, int bytes, int granule, int lane) {
  if (granule >= 4) {
    copy_words(shared_address(to), from, bytes, granule, lane);
  } else {  // 16-bit rows that start on odd elements: cp.async cannot
#pragma unroll 1
    for (int i = lane * 2; i < bytes; i += kTokenLanes * 2)
      *reinterpret_cast<uint16_t*>(static_cast<char*>(to) + i) = *reinterpret_cast<const uint16_t*>(from + i);
  }
}

// The proj row of one token into a staged row of the same element type: [B, padded | C, padded | low rank], of pairs
// [B, C, ... | low rank]; C if kC.
template <bool kC>
__device__ inline void copy_proj(const Params& p, const Bases& bases, int pixel, char* to, int lane) {
  const int element = p.element(), granule = p.proj.granule, bytes = p.states * element;
  const char* bc = bases.bc + int64_t{pixel} * p.proj.pixel;
  if (p.pairs || (kC && p.padded_states == p.states)) {
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

struct ForwardBases : Bases {
  float* sum;   // first channel of the block
  uint16_t* y;  // likewise, in 16 bits
  int64_t mbk;  // number of the track
  __device__ ForwardBases(const ForwardParams& p, const Track& t) : Bases(p, t) {
    const int64_t first = (int64_t{t.m} * p.batch + t.b) * p.tokens * p.channels + t.first_d;
    sum = p.sum + first;
    y = static_cast<uint16_t*>(p.y) + first;
    mbk = t.mbk(p);
  }
};

// What a path's visit to a token does with its part of y. The first one stores it, later ones add theirs, and in 16
// bits the last one adds all up and writes y, as does the only one.
enum class Merge { store, add, finish, write };
struct Visit {
  bool first, last;
  __device__ bool reads(const ForwardParams& p) const { return p.half && last && !first; }
  // f(std::integral_constant of what to do)
  template <typename F>
  __device__ void merge(const ForwardParams& p, F f) const {
    if (reads(p)) {
      f(std::integral_constant<Merge, Merge::finish>());
    } else if (p.half && last) {
      f(std::integral_constant<Merge, Merge::write>());
    } else if (first) {
      f(std::integral_constant<Merge, Merge::store>());
    } else {
      f(std::integral_constant<Merge, Merge::add>());
    }
  }
};

// v, a path's part of y for CH neighbouring channels from `channel` of the block on, which exist, at `offset` in y;
// `before` is what other paths left there, where it is read. Memory is not clobbered: barriers order these statements,
// and between barriers the next token's loads may pass them.
template <Merge kHow, int CH>
__device__ inline void merge(const ForwardParams& p, const ForwardBases& bases, int64_t offset, int channel,
                             const float* before, const float (&v)[CH]) {
  static_assert(CH == 1 || CH == 2 || CH == 4, "one store");
  float* const to = bases.sum + offset + channel;
  if constexpr (kHow == Merge::finish || kHow == Merge::write) {
    float sum[CH] = {};
    if constexpr (kHow == Merge::finish) read_floats<CH>(before + channel, sum);
    uint16_t bits[CH];
#pragma unroll
    for (int c = 0; c < CH; ++c) bits[c] = encode(sum[c] + v[c], p.dtype);
    uint16_t* const y = bases.y + offset + channel;
    if constexpr (CH == 4) {
      *reinterpret_cast<ushort4*>(y) = make_ushort4(bits[0], bits[1], bits[2], bits[3]);
    } else if constexpr (CH == 2) {
      *reinterpret_cast<ushort2*>(y) = make_ushort2(bits[0], bits[1]);
    } else {
      *y = bits[0];
    }
  } else if constexpr (kHow == Merge::add) {
    add_at<CH>(to, v);
  } else if constexpr (CH == 4) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
  } else if constexpr (CH == 2) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v[0]), "f"(v[1]));
  } else {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(v[0]));
  }
}

// Likewise for the slots [from, to) of a tile: `rows` of block_channels values, at `offsets` in y, with the rows of
// `before`; `exist` of the block's channels do.
template <int kWidth>
__device__ inline void merge_rows(const ForwardParams& p, const ForwardBases& bases, Visit visit, const float* rows,
                                  const int64_t* offsets, const float* before, int from, int to, int exist) {
  visit.merge(p, [&](auto how) {
#pragma unroll 2
    for (int i = (from << p.channel_shift) + threadIdx.x % 32 * kWidth; i < to << p.channel_shift; i += 32 * kWidth) {
      const int token = i >> p.channel_shift, first = token << p.channel_shift, channel = i - first;
      float v[kWidth];
      read_floats<kWidth>(rows + i, v);
      if (channel < exist) merge<how.value, kWidth>(p, bases, offsets[token], channel, before + first, v);
    }
  });
}

// merge_rows of a whole tile whose kChannels channels exist, with everything 16 bytes at a time.
template <int kChannels>
__device__ inline void merge_tile(const ForwardParams& p, const ForwardBases& bases, Visit visit, const float* rows,
                                  const int64_t* offsets, const float* before) {
  const int at = threadIdx.x % 32 * 4;
  visit.merge(p, [&](auto how) {
#pragma unroll
    for (int i = 0; i < kTile * kChannels; i += 128) {
      const int token = at / kChannels + i / kChannels;
      float v[4];
      read_floats<4>(rows + at + i, v);
      merge<how.value, 4>(p, bases, offsets[token], at % kChannels, before + token * kChannels, v);
    }
  });
}

// Where to save the state with which a path enters the tile of tokens from q0 on: null unless it is to be.
__device__ inline float* saved_state(const ForwardParams& p, const Seat& seat, bool reversed, int q0) {
  const int beyond = q0 + kTile, in_piece = (reversed ? beyond : q0) & ((1 << p.checkpoint_shift) - 1);
  if (p.saved_states == nullptr || (in_piece != 0 && !(reversed && beyond >= p.tokens))) return nullptr;
  const int64_t track = reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at)->mbk;
  return p.saved_states + (track * p.pieces() + (q0 >> p.checkpoint_shift)) * p.states * p.channels;
}

// The slots of a tile that hold tokens of a walk: all but where the walk ends. Slots are in the order of the path.
struct Slots {
  int first, end;
  __device__ Slots(const Track& track, int count) : first(track.reversed ? kTile - count : 0), end(first + count) {}
  __device__ bool hold(int slot) const { return slot >= first && slot < end; }
};

// Which token of the tile from `first` on a thread helps to copy: its pixel, and its slot in the two buffers. Past
// `end`: the last token once more.
struct Target {
  int pixel, slot;
  __device__ Target(const ForwardParams& p, const Seat& seat, const Track& track, int first, int end, int buffer) {
    const int place = opaque(seat.copy_token);
    pixel = track.pixel(p, min(first + (track.reversed ? kTile - 1 - place : place), end - 1));
    slot = buffer * kTile + place;
  }
};

// Starts the copies of the tile of tokens from `first` on into one of the two buffers, and notes where its tokens are
// in y if kOutput.
template <bool kOutput>
__device__ inline void issue_tile(const ForwardParams& p, const Seat& seat, const Track& track, int first, int end,
                                  int buffer, bool delta, bool sum) {
  const ForwardBases& bases = *reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at);
  const int lane = opaque(seat.copy_lane), element = opaque(p.element());
  const int real_bytes = min(p.block_channels, p.channels - opaque(track.first_d)) * element;
  const auto [pixel, slot] = Target(p, seat, track, first, end, buffer);
  const int x_bytes = p.x_pitch * element;
  char* const shared = seat.shared + opaque(0);
  if (kOutput && lane == 0) reinterpret_cast<int64_t*>(shared + p.offsets_at)[slot] = int64_t{pixel} * p.channels;
  copy_proj<kOutput>(p, bases, pixel, shared + p.rows_at + slot * p.pitch * element, lane);
  copy_row(shared + p.x_at + slot * x_bytes, bases.x + int64_t{pixel} * p.x.pixel, real_bytes, p.x.granule, lane);
  if (delta)
    copy_row(shared + p.delta_at + slot * x_bytes, bases.delta + int64_t{pixel} * p.delta.pixel, real_bytes,
             p.delta.granule, lane);
  if (kOutput && sum)
    copy_row(shared + p.sum_at + slot * p.block_channels * 4,
             reinterpret_cast<const char*>(bases.sum + int64_t{pixel} * p.channels), real_bytes / element * 4,
             p.sum_granule, lane);
  copies_commit();
}

// `kBytes` contiguous bytes in pieces of kPiece, one of the kTokenLanes threads' share.
template <int kPiece, int kBytes>
__device__ inline void copy_pieces(uint32_t to, const char* from, int lane) {
#pragma unroll
  for (int i = 0; i < kBytes; i += kPiece * kTokenLanes)
    if (i + kPiece * kTokenLanes <= kBytes || lane * kPiece < kBytes - i)
      copy_async<kPiece>(to + lane * kPiece + i, from + lane * kPiece + i);
}

// issue_tile where the lengths of a token's rows are known: of B and C of NS states and of 32 * CH channels, and a rank
// of at most kHeld unless that is 0 (ForwardParams::whole).
template <int NS, int CH, int kHeld, bool kOutput, bool kHalf>
__device__ inline void issue_whole_tile(const ForwardParams& p, const Seat& seat, const Track& track, int first,
                                        int end, int buffer, bool sum) {
  constexpr int kElement = kHalf ? 2 : 4, kPadded = padded_of(NS), kRowBytes = 32 * CH * kElement;
  constexpr int kStatesBytes = (kOutput ? 2 : 1) * NS * kElement;
  const int pitch = kHeld > 0 ? pitch_of(kPadded, kHeld) : p.pitch;
  const ForwardBases& bases = *reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at);
  const int lane = opaque(seat.copy_lane);
  const auto [pixel, slot] = Target(p, seat, track, first, end, buffer);
  if (kOutput && lane == 0)
    reinterpret_cast<int64_t*>(seat.shared + opaque(p.offsets_at))[slot] = int64_t{pixel} * p.channels;
  const uint32_t shared = shared_address(seat.shared) + opaque(0), row = shared + p.rows_at + slot * pitch * kElement;
  const char* const bc = bases.bc + int64_t{pixel} * p.proj.pixel;
  if constexpr (kPadded != NS) {
    static_assert(NS == 1, "one of each");
    if (lane < (kOutput && !kHalf ? 2 : 1)) copy_async<4>(row + lane * kPadded * 4, bc + lane * 4);
  } else if (!kHalf && p.proj.granule >= 8) {
    copy_pieces<8, kStatesBytes>(row, bc, lane);
  } else {
    copy_pieces<4, kStatesBytes>(row, bc, lane);
  }
  const char* const low = bases.low + int64_t{pixel} * p.proj.pixel;
  const uint32_t low_row = row + 2 * kPadded * kElement;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = lane * 4; i < kHeld * kElement + lane * 4; i += kTokenLanes * 4)
      if (i < p.rank * kElement) copy_async<4>(low_row + i, low + i);
  } else if (p.rank > 0) {
    copy_words(low_row, low, p.rank * kElement, p.proj.granule, lane);
  } else {
    copy_pieces<16, kRowBytes>(shared + p.delta_at + slot * kRowBytes, bases.delta + int64_t{pixel} * p.delta.pixel,
                               lane);
  }
  copy_pieces<16, kRowBytes>(shared + p.x_at + slot * kRowBytes, bases.x + int64_t{pixel} * p.x.pixel, lane);
  if (kHalf && kOutput && sum)
    copy_pieces<16, 32 * CH * 4>(shared + p.sum_at + slot * 32 * CH * 4,
                                 reinterpret_cast<const char*>(bases.sum + int64_t{pixel} * p.channels), lane);
  copies_commit();
}

// The tiles of tokens [from, to) of the axis in the order in which a walk takes them: along the path, but against it
// for the summaries of a shared decay. The first one is issued before the walk begins.
template <class Scan, bool kOutput>
struct Tiles {
  int from, to;
  bool descending;

  __device__ Tiles(const Track& track, int from, int to)
      : from(from), to(to), descending(track.reversed != (Scan::kSharedDecay && !kOutput)) {}
  __device__ int count() const { return (to - from + kTile - 1) / kTile; }
  __device__ int first_token(int tile) const { return from + (descending ? count() - 1 - tile : tile) * kTile; }
  __device__ void issue(const ForwardParams& p, const Seat& seat, const Track& track, Visit visit, int tile) const {
    if constexpr (Scan::kStates > 0) {
      const auto issue_whole = [&](auto half) {
        issue_whole_tile<Scan::kStates, Scan::kChannels, Scan::kMostHeld, kOutput, half.value>(
            p, seat, track, first_token(tile), to, tile & 1, visit.reads(p));
      };
      if (p.whole && p.half) return issue_whole(std::true_type());
      if (p.whole) return issue_whole(std::false_type());
    }
    issue_tile<kOutput>(p, seat, track, first_token(tile), to, tile & 1, Scan::kReadsDelta && p.rank == 0,
                        visit.reads(p));
  }
};

// 16-bit values staged at `from` as floats at `to`; `count` is a multiple of 4.
__device__ inline void decode_staged(const char* from, float* to, int count, DType dtype) {
#pragma unroll 1
  for (int i = threadIdx.x % 32 * 4; i < count; i += 32 * 4)
    *reinterpret_cast<float4*>(to + i) = decode_quad(from + i * 2, dtype);
}
// Likewise the rows of a tile, of pairs.
__device__ inline void decode_pairs(const char* from, float* to, int pitch, DType dtype) {
  constexpr int kLowAt = 2 * padded_of(1);
  const int token = threadIdx.x % 32 / kTokenLanes, lane = threadIdx.x % kTokenLanes;
  from += token * pitch * 2;
  to += token * pitch;
  if (lane == 0) decode_pair(from, to, dtype);
#pragma unroll 1
  for (int at = kLowAt + lane * 4; at < pitch; at += kTokenLanes * 4)
    *reinterpret_cast<float4*>(to + at) = decode_quad(from + at * 2, dtype);
}
// decode_staged, all loads before the first store: their latencies overlap.
template <int kCount>
__device__ inline void decode_known(const char* from, float* to, DType dtype) {
  constexpr int kTimes = (kCount + 127) / 128;
  const int at = threadIdx.x % 32 * 4;
  float4 quads[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; ++i)
    if ((i + 1) * 128 <= kCount || at + i * 128 < kCount) quads[i] = decode_quad(from + (at + i * 128) * 2, dtype);
#pragma unroll
  for (int i = 0; i < kTimes; ++i)
    if ((i + 1) * 128 <= kCount || at + i * 128 < kCount) *reinterpret_cast<float4*>(to + at + i * 128) = quads[i];
}
}  // namespace
}  // namespace cuda
}  // namespace diffmf
