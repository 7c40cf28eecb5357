// The forward scan token by token.
#pragma once

#include "ss2d_forward.cuh"

namespace diffmf {
namespace cuda {
namespace {

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

// dt_bias + low rank * dt_weight of one token (0 < rank <= kHeld); zeros follow the staged low-rank part.
template <int CH, int kHeld>
__device__ inline void held_raw(const float* low_part, const StepWeights<CH, kHeld>& weights, float (&raw)[CH]) {
  float low[kHeld];
  read_floats<kHeld>(low_part, low);
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

// A shared decay is that of all states of a channel, so it need not be multiplied into each of them at every token:
// within a tile they are kept divided by the decay since the tile began, `since`, and made whole at its end, or before
// that falls below this.
constexpr float kLeastSince = 0x1p-40f;
constexpr int kTogether = 4;  // tokens whose decays are looked at together
template <int NS, int CH>
__device__ inline void make_whole(float (&h)[CH][NS], float (&since)[CH]) {
#pragma unroll
  for (int c = 0; c < CH; ++c) {
#pragma unroll
    for (int n = 0; n < NS; ++n) h[c][n] *= since[c];
    since[c] = 1.f;
  }
}

template <int NS, int CH, bool kShared, bool kZoh, int kHeld>
struct Recurrence;

// Walks the tiles of a path, the first of which has been issued. `a` and h are the thread's decays and its state, in
// and out.
// kZoh: zero-order hold without a shared decay; with one it is told apart at run time, being the work of a token.
// Summaries (!kOutput) also add up the steps. With a shared decay they are taken from the end: what a token leaves
// there is its input, times the decay of all after it, times B.
// kHeld > 0: the thread holds all states of its channels, which exist all or none, and the weights of their low-rank
// part, whose rank is at most kHeld; the step is its softplus, and is computed where the token is scanned. Otherwise
// the lanes of a channel share the work of a tile's steps beforehand.
template <int NS, int CH, bool kSharedDecay, bool kZoh, int kHeld, bool kOutput>
__device__ void walk(const ForwardParams& p, const Seat& seat, const Track& track,
                     const Tiles<Recurrence<NS, CH, kSharedDecay, kZoh, kHeld>, kOutput>& tiles, Visit visit,
                     const float (&a)[CH][kSharedDecay ? 1 : NS], float (&h)[CH][NS], float (&step_sum)[CH]) {
  constexpr bool kAlone = kHeld > 0;
  constexpr int kQuad = NS < 4 ? NS : 4, kPadded = padded_of(NS);
  // Known where the thread is alone.
  const int pitch = kAlone ? pitch_of(kPadded, kHeld) : p.pitch, padded_states = kAlone ? kPadded : p.padded_states;
  const int block_channels = kAlone ? 32 * CH : p.block_channels;
  const ForwardBases& bases = *reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at);
  constexpr bool kFromEnd = kSharedDecay && !kOutput;
  float inverse[CH][kSharedDecay ? 1 : NS];
  if constexpr (kZoh || (kSharedDecay && !kAlone)) invert_decays(a, inverse);
  float after[CH];  // from the end: the decay of all tokens after this one
#pragma unroll
  for (int c = 0; c < CH; ++c) after[c] = 1.f;

  const float* const channels = reinterpret_cast<const float*>(seat.shared + p.channels_at) + seat.c;
  copies_wait();  // of what the steps and the skip need, at a path's first walk
  __syncwarp();
  const StepWeights<CH, kAlone ? kHeld : 1> weights(p, channels);  // read where the thread is alone
  float skip[CH] = {};
  if constexpr (kOutput) read_floats<CH>(channels + kSkipRow * p.block_channels, skip);

#pragma unroll 1
  for (int tile = 0; tile < tiles.count(); ++tile) {
    const int q0 = tiles.first_token(tile), buffer = (tile & 1) * kTile;
    char* const shared = seat.shared + opaque(0);
    const float* rows = reinterpret_cast<const float*>(shared + p.rows_at + buffer * pitch * p.element());
    float* x_rows = reinterpret_cast<float*>(shared + p.x_at + buffer * block_channels * p.element());
    copies_wait();
    __syncwarp();
    if (tile + 1 < tiles.count())
      tiles.issue(p, seat, track, visit, tile + 1);  // into the buffer that everyone has left
    if (p.half) {
      float* const decoded = reinterpret_cast<float*>(shared + p.decoded_at);
      const char *const raw_rows = reinterpret_cast<const char*>(rows), *const raw_x = reinterpret_cast<char*>(x_rows);
      if (NS == 1 && p.pairs) {
        decode_pairs(raw_rows, decoded, pitch, p.dtype);
      } else if constexpr (kAlone) {
        decode_known<kTile * pitch_of(kPadded, kHeld)>(raw_rows, decoded, p.dtype);
      } else {
        decode_staged(raw_rows, decoded, kTile * pitch, p.dtype);
      }
      if (kAlone || p.whole) {
        decode_known<kTile * 32 * CH>(raw_x, decoded + kTile * pitch, p.dtype);
      } else {
        decode_staged(raw_x, decoded + kTile * pitch, kTile * block_channels, p.dtype);
      }
      rows = decoded;
      x_rows = decoded + kTile * pitch;
      __syncwarp();
    }
    const float* steps = reinterpret_cast<const float*>(shared + p.steps_at) + seat.c;
    if constexpr (!kAlone) {
      const char* const raw_delta = shared + p.delta_at + buffer * block_channels * p.element();
      if (p.state_lanes <= kTile / 4) {
        compute_steps<CH, 4>(p, seat, rows, channels, raw_delta, const_cast<float*>(steps));
      } else {
        compute_steps<CH, 1>(p, seat, rows, channels, raw_delta, const_cast<float*>(steps));
      }
      __syncwarp();
    }

    if constexpr (kOutput) {
      float* const saved = saved_state(p, seat, track.reversed, q0);
      if (saved != nullptr) store_state<NS, CH>(p, saved, opaque(track.first_d) + seat.c, seat.lane, h);
    }

    const Slots slots(track, min(kTile, tiles.to - q0));
    const int count = slots.end - slots.first, first = kFromEnd ? slots.end - 1 : slots.first;
    const int row_step = kFromEnd ? -pitch : pitch, x_step = kFromEnd ? -block_channels : block_channels;
    const float* row = rows + first * pitch;
    float* x_row = x_rows + first * block_channels + seat.c;
    if constexpr (!kAlone) steps += first * block_channels;
    // Of the token at `row`: x, its step, and what goes into the state; with a shared decay, that too.
    auto read_token = [&](const float* row, const float* x_row, const float* steps, float (&x)[CH], float (&step)[CH],
                          float (&input)[CH], float (&decay)[CH]) {
      read_floats<CH>(x_row, x);
      if constexpr (kAlone) {
        held_raw(row + 2 * padded_states, weights, step);
#pragma unroll
        for (int c = 0; c < CH; ++c) step[c] = softplus(step[c]);
      } else {
        read_floats<CH>(steps, step);
      }
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        input[c] = (kZoh ? kLog2e : step[c]) * x[c];
        if constexpr (!kOutput) step_sum[c] += step[c];
        if constexpr (kSharedDecay) {
          const float v = step[c] * a[c][0];
          decay[c] = exp2_fast(v);
          if constexpr (!kAlone)
            if (p.zoh) input[c] = zoh_weight(step[c] * kLn2, v, decay[c], inverse[c][0]) * kLog2e * x[c];
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
        if constexpr (kOutput) read_floats<kQuad>(bc + padded_states + first, cc);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            float& state = h[c][first + j];
            if constexpr (kSharedDecay) {
              state = fmaf(input[c], b[j], state);
            } else {
              const float v = step[c] * a[c][first + j], decay = exp2_fast(v);
              float u = input[c] * b[j];
              if constexpr (kZoh) u *= zoh_weight(step[c] * kLn2, v, decay, inverse[c][first + j]);
              state = fmaf(decay, state, u);
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
      if constexpr (kOutput && !kAlone)
        if (p.state_lanes > 1) __syncwarp();  // all lanes have read x, whose place y takes
    };
    // y of a token takes the place of its x, which no lane of the channels needs any more.
    auto keep_token = [&](float* x_row, const float (&x)[CH], float (&y)[CH]) {
#pragma unroll
      for (int c = 0; c < CH; ++c) y[c] = fmaf(skip[c], x[c], y[c]);
      if (kAlone || seat.lane == 0) write_floats<CH>(x_row, y);
    };
    if constexpr (kSharedDecay && kOutput) {
      float since[CH];
#pragma unroll
      for (int c = 0; c < CH; ++c) since[c] = 1.f;
#pragma unroll 1
      for (int i = 0; i < count; i += kTogether) {
        float x[kTogether][CH], step[CH], input[kTogether][CH], decay[CH], at[kTogether][CH], y[CH];
        bool fits = i + kTogether <= count;
        if (fits) {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            read_token(row + j * row_step, x_row + j * x_step, steps + j * x_step, x[j], step, input[j], decay);
#pragma unroll
            for (int c = 0; c < CH; ++c) {
              at[j][c] = (j == 0 ? since[c] : at[j - 1][c]) * decay[c];
              fits = fits && at[j][c] >= kLeastSince;
            }
          }
        }
        // The lanes of a channel shuffle where they branch.
        if constexpr (!kAlone) fits = __all_sync(0xffffffffu, fits);
        if (fits) {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
#pragma unroll
            for (int c = 0; c < CH; ++c) input[j][c] *= reciprocal(at[j][c]);
            scan_token(row + j * row_step, step, input[j], y);
#pragma unroll
            for (int c = 0; c < CH; ++c) y[c] *= at[j][c];
            keep_token(x_row + j * x_step, x[j], y);
          }
#pragma unroll
          for (int c = 0; c < CH; ++c) since[c] = at[kTogether - 1][c];
        } else {
#pragma unroll 1
          for (int j = 0; j < min(kTogether, count - i); ++j) {
            read_token(row + j * row_step, x_row + j * x_step, steps + j * x_step, x[0], step, input[0], decay);
#pragma unroll
            for (int c = 0; c < CH; ++c) since[c] *= decay[c];
            make_whole<NS, CH>(h, since);
            scan_token(row + j * row_step, step, input[0], y);
            keep_token(x_row + j * x_step, x[0], y);
          }
        }
        row += kTogether * row_step;
        x_row += kTogether * x_step;
        steps += kTogether * x_step;
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
        if constexpr (kOutput) keep_token(x_row, x, y);
        row += row_step;
        x_row += x_step;
        if constexpr (!kAlone) steps += x_step;
      }
    }
    if constexpr (kOutput) {
      __syncwarp();
      const int64_t* const offsets = reinterpret_cast<const int64_t*>(shared + p.offsets_at) + buffer;
      const float* const before = reinterpret_cast<const float*>(shared + p.sum_at) + buffer * block_channels;
      const int exist = p.channels - opaque(track.first_d);
      if (p.whole && count == kTile) {
        merge_tile<32 * CH>(p, bases, visit, x_rows, offsets, before);
      } else if (p.sum_granule == 16) {
        merge_rows<4>(p, bases, visit, x_rows, offsets, before, slots.first, slots.end, exist);
      } else if (p.sum_granule == 8) {
        merge_rows<2>(p, bases, visit, x_rows, offsets, before, slots.first, slots.end, exist);
      } else {
        merge_rows<1>(p, bases, visit, x_rows, offsets, before, slots.first, slots.end, exist);
      }
    }
  }
}

// The scan of a thread: NS states of CH channels.
template <int NS, int CH, bool kShared, bool kZoh, int kHeld>
struct Recurrence {
  static constexpr bool kSharedDecay = kShared, kReadsDelta = kHeld == 0;
  static constexpr int kWarps = most_warps(NS * CH <= 8 && !kZoh && !(kShared && CH == 2));
  static constexpr int kChannels = CH, kStates = NS, kMostHeld = kHeld;

  int d;  // first channel
  float a[CH][kShared ? 1 : NS], h[CH][NS], step_sum[CH];

  __device__ Recurrence(const ForwardParams& p, const Seat& seat, const Track& track) : d(track.first_d + seat.c) {
    load_decays<NS, CH, kShared>(p, track, d, seat.lane, a);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      step_sum[c] = 0.f;
#pragma unroll
      for (int n = 0; n < NS; ++n) h[c][n] = 0.f;
    }
  }
  __device__ void load(const ForwardParams& p, const Seat& seat, const float* plane) {
    load_state<NS, CH>(p, plane, d, seat.lane, h);
  }
  __device__ void store(const ForwardParams& p, const Seat& seat, float* plane) const {
    store_state<NS, CH>(p, plane, d, seat.lane, h);
  }
  __device__ void store_steps(const ForwardParams& p, const Seat& seat, float* to) const {
#pragma unroll
    for (int c = 0; c < CH; ++c)
      if (seat.lane == 0 && d + c < p.channels) to[d + c] = step_sum[c];
  }
  template <bool kOutput>
  __device__ void advance(const ForwardParams& p, const Seat& seat, const Track& track,
                          const Tiles<Recurrence, kOutput>& tiles, Visit visit) {
    walk<NS, CH, kShared, kZoh, kHeld, kOutput>(p, seat, track, tiles, visit, a, h, step_sum);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace diffmf
