// The forward scan of a decay that all states of a channel share (the SSD form), a tile of tokens at a time by matrix
// products on tensor cores.
//
// With z_t the exponent of the decay from the tile's start through token t, the tile's inputs u_s = x_s step_s e^-z_s,
// and h the state that enters it,
//
//   y_t = e^z_t (C_t . h + sum over s <= t of (C_t . B_s) u_s),    h' = e^z_T (h + sum over s of u_s B_s):
//
// for all channels at once products of matrices, of which only C B^T, tokens by tokens, is common to the channels.
// Each factor is taken as the sum of two TF32 numbers and three products of four are kept: relative error 2^-20.
// Where e^z leaves the range that is safe, or something is not finite (a zero in a matrix would not keep it from tokens
// before it), the tile's tokens are taken one after another.
//
// For more than 16 states: with fewer, what a token costs beside its states (staging, its step) outweighs them, and the
// recurrence is as fast.
//
// Lanes. Fragments of mma.m16n8k8: with g = lane / 4 and t = lane % 4, the accumulator of 16 channels by 8 tokens (or
// states) has channels g and g + 8, columns 2t and 2t + 1; as a first operand the same registers have columns t and
// t + 4, so columns of a contraction are permuted throughout: t stands for 2t, t + 4 for 2t + 1. Which channel is g is
// free: a thread's are neighbours in memory.
#pragma once

#include "ss2d_forward.cuh"

namespace diffmf {
namespace cuda {
namespace {

// Four values (a first operand) or two (a second one) as sums of two TF32 numbers; the tensor core drops the lower bits
// of what is left.
template <int kCount>
struct Split {
  uint32_t high[kCount], low[kCount];
  template <typename... Values>
  __device__ explicit Split(Values... values) {
    const float v[] = {values...};
    static_assert(sizeof(v) == kCount * sizeof(float), "one value each");
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = __float_as_uint(v[i]) & 0xffffe000u;
      low[i] = __float_as_uint(v[i] - __uint_as_float(high[i]));
    }
  }
};

__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&sum)[4], const Split<4>& a, const Split<2>& b) {
  multiply_add(sum, a.low, b.high);
  multiply_add(sum, a.high, b.low);
  multiply_add(sum, a.high, b.high);
}

constexpr float kMostExponent = 40.f;  // of e^z, in powers of two

// The scan of a thread's share of 16 MT channels and 8 NT states. A warp is alone with its channels.
template <int MT, int NT>
struct MatrixForm {
  static constexpr bool kSharedDecay = true, kReadsDelta = true;
  static constexpr int kStates = 0, kWarps = most_warps(false);
  static constexpr int kChannels = 2 * MT;  // of a thread, `kWide` of them neighbours
  static constexpr int kWide = kChannels < 4 ? kChannels : 4;
  int g, t, first_d;
  float a[kChannels], step_sum[kChannels];
  float h[MT][NT][4];  // channels 2m and 2m + 1 of the thread's, states 8j + 2t and 8j + 2t + 1

  // Channel of the block.
  __device__ int channel(int c) const { return c / kWide * 8 * kWide + g * kWide + c % kWide; }

  __device__ MatrixForm(const ForwardParams& p, const Seat&, const Track& track)
      : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), first_d(track.first_d), h{} {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int d = first_d + channel(c);
      a[c] = d < p.channels ? p.a[track.mk(p) * p.channels + d] * kLog2e : 0.f;
      step_sum[c] = 0.f;
    }
  }

  // f(address in the [N, D] plane, first of two channels, second one, how many of them exist) for each of the states.
  template <typename Plane, typename F>
  __device__ void for_states(const ForwardParams& p, Plane* plane, F f) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = 8 * j + 2 * t + i, d = first_d + channel(2 * m);
          if (n < p.states) f(plane + int64_t{n} * p.channels + d, h[m][j][i], h[m][j][2 + i], p.channels - d);
        }
  }
  __device__ void load(const ForwardParams& p, const Seat&, const float* plane) {
    const bool pairs = p.channels % 2 == 0;
    for_states(p, plane, [pairs](const float* from, float& first, float& second, int exist) {
      if (pairs && exist > 0) {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        first = pair.x;
        second = pair.y;
      } else {
        if (exist > 0) first = from[0];
        if (exist > 1) second = from[1];
      }
    });
  }
  __device__ void store(const ForwardParams& p, const Seat&, float* plane) {
    const bool pairs = p.channels % 2 == 0;
    for_states(p, plane, [pairs](float* to, float first, float second, int exist) {
      if (pairs && exist > 0) {
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
      } else {
        if (exist > 0) to[0] = first;
        if (exist > 1) to[1] = second;
      }
    });
  }
  __device__ void store_steps(const ForwardParams& p, const Seat&, float* to) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (t == 0 && first_d + channel(c) < p.channels) to[first_d + channel(c)] = step_sum[c];
  }

  // The thread's channels of a row in shared memory.
  __device__ void read_channels(const float* row, float (&v)[kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; c += kWide) {
      float some[kWide];
      read_floats<kWide>(row + channel(c), some);
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[c + i] = some[i];
    }
  }
  // Likewise of a staged row of activations.
  __device__ void read_staged(const ForwardParams& p, const char* row, float (&v)[kChannels]) const {
    if (!p.half) {
      read_channels(reinterpret_cast<const float*>(row), v);
      return;
    }
#pragma unroll
    for (int c = 0; c < kChannels; c += kWide) {
      const char* const from = row + channel(c) * 2;
      if constexpr (kWide == 4) {
        const float4 quad = decode_quad(from, p.dtype);
        v[c] = quad.x;
        v[c + 1] = quad.y;
        v[c + 2] = quad.z;
        v[c + 3] = quad.w;
      } else {
        float pair[2];
        read_activation<2, true>(p, from, 0, pair);
        v[c] = pair[0];
        v[c + 1] = pair[1];
      }
    }
  }

  // The steps of the thread's two tokens.
  __device__ void compute_steps(const ForwardParams& p, const float* const (&row)[2], const float* channels,
                                const char* const (&raw_delta)[2], float (&step)[2][kChannels]) const {
    read_channels(channels + kBiasRow * p.block_channels, step[0]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) step[1][c] = step[0][c];
    if (p.rank > 0) {
      const float* weights = channels + kWeightRows * p.block_channels;
      const int low_at = 2 * p.padded_states;
#pragma unroll 1
      for (int r = 0; r < p.rank; r += 2, weights += 2 * p.block_channels) {  // zeros follow the last rank
        float w[2][kChannels], low[2][2];
        read_channels(weights, w[0]);
        read_channels(weights + p.block_channels, w[1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          read_floats<2>(row[i] + low_at + r, low[i]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            step[i][c] = fmaf(low[i][1], w[1][c], fmaf(low[i][0], w[0][c], step[i][c]));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float delta[kChannels];
        read_staged(p, raw_delta[i], delta);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) step[i][c] += delta[c];
      }
    }
    if (p.softplus) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) step[i][c] = softplus(step[i][c]);
    }
  }

  // Walks the tiles of the path, the first of which has been issued. Summaries (!kOutput) take them from the path's
  // end: what a token leaves there is its input, times the decay of all after it, times B; and they add up the steps.
  template <bool kOutput>
  __device__ void advance(const ForwardParams& p, const Seat& seat, const Track& track,
                          const Tiles<MatrixForm, kOutput>& tiles, Visit visit) {
#pragma unroll 1
    for (int tile = 0; tile < tiles.count(); ++tile) {
      const int q0 = tiles.first_token(tile), buffer = (tile & 1) * kTile;
      const Slots slots(track, min(kTile, tiles.to - q0));
      char* const shared = seat.shared + opaque(0);
      const float* rows = reinterpret_cast<const float*>(shared + p.rows_at + buffer * p.pitch * p.element());
      copies_wait();
      __syncwarp();
      if (tile + 1 < tiles.count())
        tiles.issue(p, seat, track, visit, tile + 1);  // into the buffer that everyone has left
      if (p.half) {
        float* const decoded = reinterpret_cast<float*>(shared + p.decoded_at);
        decode_staged(reinterpret_cast<const char*>(rows), decoded, kTile * p.pitch, p.dtype);
        rows = decoded;
        __syncwarp();
      }
      if constexpr (kOutput) {
        float* const saved = saved_state(p, seat, track.reversed, q0);
        if (saved != nullptr) store(p, seat, saved);
      }

      // Slots are in the order of the path; the thread's are 2t and 2t + 1. Those past the end change nothing.
      const int at[2] = {2 * t, 2 * t + 1};
      const float* const row[2] = {rows + at[0] * p.pitch, rows + at[1] * p.pitch};
      const int x_bytes = p.x_pitch * p.element();
      const char* const x_rows = shared + p.x_at + buffer * x_bytes;
      const char* const deltas = shared + p.delta_at + buffer * x_bytes;
      const float* const channels = reinterpret_cast<const float*>(shared + p.channels_at);
      float step[2][kChannels], input[2][kChannels];
      const char* const delta[2] = {deltas + at[0] * x_bytes, deltas + at[1] * x_bytes};
      compute_steps(p, row, channels, delta, step);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        read_staged(p, x_rows + at[i] * x_bytes, input[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) input[i][c] *= step[i][c];
      }
      if (slots.end - slots.first < kTile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (slots.hold(at[i])) continue;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) step[i][c] = input[i][c] = 0.f;
        }
      }

      // Exponents, from the tile's start through each token.
      float z[2][kChannels], most = 0.f, zero = 0.f;  // zero: or NaN
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float both = step[0][c] + step[1][c];
        float through = both;
        float before = __shfl_up_sync(0xffffffffu, through, 1, 4);
        if (t >= 1) through += before;
        before = __shfl_up_sync(0xffffffffu, through, 2, 4);
        if (t >= 2) through += before;
        if constexpr (kOutput) {
          z[0][c] = a[c] * (through - both + step[0][c]);
          z[1][c] = a[c] * through;
          most = fmaxf(most, fmaxf(fabsf(z[0][c]), fabsf(z[1][c])));
          zero = fmaf(input[0][c] + input[1][c], 0.f, zero);
        } else {  // from here to the path's end, without this token
          const float total = __shfl_sync(0xffffffffu, through, 3, 4);
          z[1][c] = a[c] * (total - through + step_sum[c]);
          z[0][c] = fmaf(a[c], step[1][c], z[1][c]);
          step_sum[c] += total;
          input[0][c] *= exp2_fast(z[0][c]);
          input[1][c] *= exp2_fast(z[1][c]);
        }
      }

      if constexpr (!kOutput) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const Split<4> u(input[0][2 * m], input[0][2 * m + 1], input[1][2 * m], input[1][2 * m + 1]);
#pragma unroll
          for (int j = 0; j < NT; ++j) multiply_add(h[m][j], u, Split<2>(row[0][8 * j + g], row[1][8 * j + g]));
        }
      } else {
        float products[4] = {};  // C B^T: this thread's of token g with 2t and 2t + 1
        const float* const row_g = rows + g * p.pitch + 2 * t;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          float v[2];
          read_floats<2>(row_g + p.padded_states + 8 * j, v);
          const Split<4> c(v[0], 0.f, v[1], 0.f);
          read_floats<2>(row_g + 8 * j, v);
          multiply_add(products, c, Split<2>(v[0], v[1]));
        }
        const Split<2> product(2 * t <= g ? products[0] : 0.f, 2 * t + 1 <= g ? products[1] : 0.f);

        zero = fmaf(products[0] + products[1], 0.f, zero);
        const bool all_fit = __all_sync(0xffffffffu, most <= kMostExponent && zero == 0.f);
        float y[2][kChannels];
        if (all_fit) {
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            float u[4], sums[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) u[i] = input[i / 2][2 * m + i % 2] * exp2_fast(-z[i / 2][2 * m + i % 2]);
            apply(m, u, product, row, row_g + p.padded_states, sums);
#pragma unroll
            for (int i = 0; i < 4; ++i) y[i % 2][2 * m + i / 2] = sums[i] * exp2_fast(z[i % 2][2 * m + i / 2]);
            scale(m, exp2_fast(__shfl_sync(0xffffffffu, z[1][2 * m], 3, 4)),
                  exp2_fast(__shfl_sync(0xffffffffu, z[1][2 * m + 1], 3, 4)));
          }
        } else {
          compute_steps(p, row, channels + opaque(0), delta, step);  // again: kept, they would be spilled
#pragma unroll 1
          for (int slot = slots.first; slot < slots.end; ++slot)
            one_by_one(slot, rows + slot * p.pitch + 2 * t, p.padded_states, step, input, y);
        }
        write(p, seat, track, at, slots, buffer, visit, y);
      }
    }
  }

 private:
  // Multiplies the states of channels 2m and 2m + 1.
  __device__ void scale(int m, float first, float second) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) h[m][j][i] *= i < 2 ? first : second;
  }
  // Adds what channels 2m and 2m + 1 put out to sums, and their inputs u to the states.
  __device__ void apply(int m, const float (&u)[4], const Split<2>& product, const float* const (&row)[2],
                        const float* c_row, float (&sums)[4]) {
    const Split<4> split(u[0], u[1], u[2], u[3]);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float c[2];
      read_floats<2>(c_row + 8 * j, c);
      multiply_add(sums, Split<4>(h[m][j][0], h[m][j][2], h[m][j][1], h[m][j][3]), Split<2>(c[0], c[1]));
    }
    multiply_add(sums, split, product);
#pragma unroll
    for (int j = 0; j < NT; ++j) multiply_add(h[m][j], split, Split<2>(row[0][8 * j + g], row[1][8 * j + g]));
  }
  // The recurrence for one token of the tile. `row` is at the thread's first state of B, C lies `to_c` further on.
  __device__ void one_by_one(int slot, const float* row, int to_c, const float (&step)[2][kChannels],
                             const float (&input)[2][kChannels], float (&y)[2][kChannels]) {
    const bool odd = slot % 2 == 1, owns = t == slot / 2;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float decay = exp2_fast(a[c] * __shfl_sync(0xffffffffu, odd ? step[1][c] : step[0][c], slot / 2, 4));
      const float u = __shfl_sync(0xffffffffu, odd ? input[1][c] : input[0][c], slot / 2, 4);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float b[2], cc[2];
        read_floats<2>(row + 8 * j, b);
        read_floats<2>(row + to_c + 8 * j, cc);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& state = h[c / 2][j][2 * (c % 2) + i];
          state = fmaf(decay, state, u * b[i]);
          sum = fmaf(cc[i], state, sum);
        }
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (owns && !odd) y[0][c] = sum;
      if (owns && odd) y[1][c] = sum;
    }
  }
  // Adds the skip to y of the thread's tokens and both to memory.
  __device__ void write(const ForwardParams& p, const Seat& seat, const Track& track, const int (&at)[2], Slots slots,
                        int buffer, Visit visit, float (&y)[2][kChannels]) {
    const ForwardBases& bases = *reinterpret_cast<const ForwardBases*>(seat.shared + p.bases_at);
    const char* const shared = seat.shared + opaque(0);
    const int x_bytes = p.x_pitch * p.element();
    float skip[kChannels];
    read_channels(reinterpret_cast<const float*>(shared + p.channels_at) + kSkipRow * p.block_channels, skip);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!slots.hold(at[i])) continue;
      float x[kChannels];
      read_staged(p, shared + p.x_at + (buffer + at[i]) * x_bytes, x);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) y[i][c] = fmaf(skip[c], x[c], y[i][c]);
      const int64_t offset = reinterpret_cast<const int64_t*>(shared + p.offsets_at)[buffer + at[i]];
      const float* const before =
          reinterpret_cast<const float*>(shared + p.sum_at) + (buffer + at[i]) * p.block_channels;
      visit.merge(p, [&](auto how) {
#pragma unroll
        for (int c = 0; c < kChannels; c += kWide) {
          const int exist = p.channels - track.first_d - channel(c);
          if (p.channels % kWide == 0) {
            float some[kWide];
#pragma unroll
            for (int k = 0; k < kWide; ++k) some[k] = y[i][c + k];
            if (exist > 0) merge<how.value, kWide>(p, bases, offset, channel(c), before, some);
          } else {
#pragma unroll
            for (int k = 0; k < kWide; ++k) {
              const float one[1] = {y[i][c + k]};
              if (k < exist) merge<how.value, 1>(p, bases, offset, channel(c) + k, before, one);
            }
          }
        }
      });
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace diffmf
