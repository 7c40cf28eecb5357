// Forward pass of ss2d in one cooperative launch.
//
// M * B * K sequences of L tokens are far too few to fill a GPU, so the axis is cut into chunks and scanned in three
// phases with grid barriers between them:
//
//   1. every (path, chunk): end state of the chunk from a zero start, and the sum of its steps;
//   2. a scan over the chunks turns those into the state that enters each chunk (prefix_chunks);
//   3. every chunk again, from its true start, now writing y.
//
// With one chunk, phases 1 and 2 vanish. A task of the grid is a (modality, batch item, channel block, chunk). Merging
// without atomics: in phase 3 the block that owns a chunk of an axis walks it once for each path of that axis, in
// order, and adds to what it wrote before; the column paths follow the row paths behind one more barrier. So each
// element of y is summed in the order rows, columns, whatever the timing, and every run gives the same bits.
#include <algorithm>

#include "launch.cuh"
#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kMinBlocks = 4;  // a multiprocessor holds: at most 128 registers a thread

template <typename T>
struct ForwardParams : Params<T> {
  T* y;                 // [M, B, L, D]
  float* sum;           // [M, B, L, D], y while paths are still missing; y itself when T is float
  float* saved_states;  // [M, B, K, pieces, N, D] or null
  float* last_state;    // [M, B, K, N, D] or null
};

// Shared memory of a block, all double-buffered but the weight.
template <typename T>
struct ForwardShared {
  TokenPlace* places;  // [2, kTile]
  float* rows;         // [2, kTile, pitch]
  float2* token;       // [2, kTile, block_channels]: step and x
  float* before;       // [2, kTile, block_channels]: what the paths before this one left in y
  float* weight;       // [R, block_channels]
  __device__ ForwardShared(const Params<T>& p, float* base)
      : places(reinterpret_cast<TokenPlace*>(base)),
        rows(base + 2 * kTile * sizeof(TokenPlace) / sizeof(float)),
        token(reinterpret_cast<float2*>(rows + 2 * kTile * p.pitch)),
        before(rows + 2 * kTile * (p.pitch + 2 * p.block_channels)),
        weight(rows + 2 * kTile * (p.pitch + 3 * p.block_channels)) {}
};

// A path's place in the sum over paths: the first starts from zero, the last writes y in its own type.
struct Merge {
  bool first, last;
};

// One block walks one chunk along one path. h is this thread's part of the state, in and out. Summaries (!kOutput)
// also return the sum of the steps of the thread's channel.
template <typename T, int NS, bool kSharedDecay, bool kZoh, bool kOutput>
__device__ float walk_chunk(const ForwardParams<T>& p, const ForwardShared<T>& shared, const Track<T>& track, int chunk,
                            Merge merge, float (&h)[NS]) {
  const int channels = p.block_channels;
  const int c = threadIdx.x / p.state_lanes, lane = threadIdx.x % p.state_lanes;
  const int slot = threadIdx.x / channels, moved_c = threadIdx.x % channels;  // the data-moving role
  const int first_d = track.group * channels;
  const bool moves = first_d + moved_c < p.channels, owns = first_d + c < p.channels;

  constexpr int kDecays = kSharedDecay ? 1 : NS, kQuad = NS < 4 ? NS : 4;
  float a[kDecays], a2[kDecays];
  load_decays<NS, kSharedDecay>(p, track, c, lane, a);
#pragma unroll
  for (int i = 0; i < kDecays; ++i) a2[i] = a[i] * kLog2e;
  const int64_t mkd = track.mk(p) * p.channels + first_d;
  const float bias = p.dt_bias != nullptr && moves ? p.dt_bias[mkd + moved_c] : 0.f;
  const float skip = kOutput && p.d != nullptr && owns ? p.d[mkd + c] : 0.f;
  __syncthreads();  // the walk before may still read the weight
  stage_weight(p, track, shared.weight);

  const int64_t image = ((int64_t{track.m} * p.batch + track.b) * p.tokens) * p.channels + first_d;
  T* out = p.y + image;
  float* sum = p.sum + image;

  const Columns columns = kOutput ? columns_bc(p) : columns_b(p);
  const int begin = chunk * p.chunk, end = min(begin + p.chunk, p.tokens);
  const int tiles = (end - begin + kTile - 1) / kTile;
  RowRegs rows;
  float x[kTile];
  auto first_token = [&](int tile) { return begin + (track.reversed ? tiles - 1 - tile : tile) * kTile; };
  auto fetch = [&](int tile) {
    const TokenPlace* places = shared.places + (tile & 1) * kTile;
    fetch_rows(p, track, columns, places, rows);
    const int first_slot = recomputed(slot);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int t = first_slot + i * p.state_lanes;
      if (t >= kTile) break;
      x[i] = 0.f;
      if (moves && places[t].valid) x[i] = decode(track.x[places[t].x + moved_c], p.is_bf16);
    }
  };

  float step_sum = 0.f;
  place_tile(p, track, first_token(0), end, shared.places);
  __syncthreads();
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int q0 = first_token(tile);
    const TokenPlace* places = shared.places + (tile & 1) * kTile;
    float* tile_rows = shared.rows + (tile & 1) * kTile * p.pitch;
    float2* tile_token = shared.token + (tile & 1) * kTile * channels;
    float* tile_before = shared.before + (tile & 1) * kTile * channels;
    store_rows(p, track, columns, places, rows, tile_rows);
    __syncthreads();
    const int first_slot = recomputed(slot);
    float before[kTile];
    if constexpr (kOutput) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int t = first_slot + i * p.state_lanes;
        before[i] = 0.f;
        if (!merge.first && moves && t < kTile && places[t].valid)
          before[i] = sum[places[t].pixel * p.channels + moved_c];
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int t = first_slot + i * p.state_lanes;
      if (t >= kTile) break;
      const bool valid = places[t].valid;
      float delta = 0.f;
      if (track.delta != nullptr && moves && valid)
        delta = decode(track.delta[offset_of(p.delta_strides, pixel_of(p, track.axis, q0 + t)) + moved_c], p.is_bf16);
      const Step step = token_step(p, tile_rows + t * p.pitch, shared.weight, moved_c, bias, delta);
      // A token past the end must leave the state alone: step 0 means decay 1 and nothing added.
      tile_token[t * channels + moved_c] = make_float2(valid ? step.value : 0.f, x[i]);
      if constexpr (kOutput) tile_before[t * channels + moved_c] = before[i];
    }
    // Between the barriers nobody reads the other half of `places`: its tile is computed, the next not yet fetched.
    if (tile + 1 < tiles) place_tile(p, track, first_token(tile + 1), end, shared.places + (~tile & 1) * kTile);
    __syncthreads();
    if (tile + 1 < tiles) fetch(tile + 1);

    if constexpr (kOutput) {
      const bool enters_piece =
          tile == 0 || (track.reversed ? (q0 + kTile) % int{kCheckpoint} == 0 : q0 % int{kCheckpoint} == 0);
      if (p.saved_states != nullptr && enters_piece && owns) {
        const int64_t piece = track.mbk(p) * p.pieces() + q0 / int{kCheckpoint};
        store_state<NS>(p, p.saved_states + piece * p.states * p.channels + first_d + c, lane, h);
      }
    }

#pragma unroll 2
    for (int i = 0; i < kTile; ++i) {
      const int t = track.reversed ? kTile - 1 - i : i;
      const float2 token = tile_token[t * channels + c];
      const float* row = tile_rows + t * p.pitch + lane * NS;
      float shared_decay = 0.f;
      if constexpr (kSharedDecay) shared_decay = exp2_fast(token.x * a2[0]);
      if constexpr (!kOutput) step_sum += token.x;
      float partial[2] = {kOutput && lane == 0 ? skip * token.y : 0.f, 0.f};
      // In groups of four states: B and C of all of them at once would not fit the registers.
#pragma unroll
      for (int first = 0; first < NS; first += kQuad) {
        float b[kQuad], cc[kQuad];
        read_states<kQuad>(row + first, b);
        if constexpr (kOutput) read_states<kQuad>(row + p.padded_states + first, cc);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const int j = first + i;
          const float decay = kSharedDecay ? shared_decay : exp2_fast(token.x * a2[kSharedDecay ? 0 : j]);
          float u;
          if constexpr (kZoh) {
            const float a_j = a[kSharedDecay ? 0 : j];
            u = token.y * zoh_weight(token.x, token.x * a_j, decay, a_j);
          } else {
            u = token.x * token.y;
          }
          h[j] = fmaf(decay, h[j], u * b[i]);
          if constexpr (kOutput) partial[i % 2] = fmaf(cc[i], h[j], partial[i % 2]);
        }
      }
      if constexpr (kOutput) {
        float y = partial[0] + partial[1];
        for (int off = 1; off < p.state_lanes; off *= 2) y += __shfl_xor_sync(0xffffffffu, y, off);
        if (owns && lane == 0 && places[t].valid) {
          const int64_t to = places[t].pixel * p.channels + c;
          y += tile_before[t * channels + c];
          if (merge.last) {
            encode(y, p.is_bf16, out + to);
          } else {
            sum[to] = y;
          }
        }
      }
    }
  }
  return step_sum;
}

template <typename T, int NS, bool kSharedDecay, bool kZoh>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    ss2d_forward_kernel(const __grid_constant__ ForwardParams<T> p) {
  extern __shared__ float4 shared_base[];
  const ForwardShared<T> shared(p, reinterpret_cast<float*>(shared_base));
  const auto grid = cooperative_groups::this_grid();
  const int c = threadIdx.x / p.state_lanes, lane = threadIdx.x % p.state_lanes;
  const int64_t plane = int64_t{p.states} * p.channels;

  clear_padding(p, shared.rows, 2 * kTile);
  const int64_t tasks = int64_t{p.modalities} * p.batch * p.groups * p.chunks;
  if (p.chunks > 1) {
    for (int64_t task = blockIdx.x; task < tasks * p.paths; task += gridDim.x) {
      const Track<T> track = track_of(p, task / p.chunks / p.paths, static_cast<int>(task / p.chunks % p.paths));
      const int64_t chunk = track.mbk(p) * p.chunks + task % p.chunks;
      float h[NS] = {};
      const float steps =
          walk_chunk<T, NS, kSharedDecay, kZoh, false>(p, shared, track, static_cast<int>(task % p.chunks), {}, h);
      const int d = track.group * p.block_channels + c;
      if (d < p.channels) {
        store_state<NS>(p, p.chunk_state + chunk * plane + d, lane, h);
        if (lane == 0) p.chunk_steps[chunk * p.channels + d] = steps;
      }
    }
    grid.sync();
    prefix_chunks(p, kSharedDecay, false);
    grid.sync();
  }
  for (int i = 0; i < p.paths; ++i) {
    if (i == p.row_paths && i > 0) grid.sync();
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
      const Track<T> track = track_of(p, task / p.chunks, p.order[i]);
      const int chunk = static_cast<int>(task % p.chunks);
      const int d = track.group * p.block_channels + c;
      float h[NS] = {};
      if (p.chunks > 1 && d < p.channels)
        load_state<NS>(p, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane + d, lane, h);
      walk_chunk<T, NS, kSharedDecay, kZoh, true>(p, shared, track, chunk, {i == 0, i == p.paths - 1}, h);
      const bool final_chunk = chunk == (track.reversed ? 0 : p.chunks - 1);
      if (p.last_state != nullptr && final_chunk && d < p.channels)
        store_state<NS>(p, p.last_state + track.mbk(p) * plane + d, lane, h);
    }
  }
}

template <typename T>
using ForwardKernel = void (*)(ForwardParams<T>);

// Zero-order hold and shared decays are compiled for fewer widths than the default form.
template <typename T>
ForwardKernel<T> kernel_of(const SS2DProblem& problem, int states_per_thread) {
  const bool zoh = problem.discretization == Discretization::zoh, shared = has_shared_decay(problem);
  switch (states_per_thread) {
    case 1:
      return ss2d_forward_kernel<T, 1, false, false>;
    case 4:
      if (zoh) return shared ? ss2d_forward_kernel<T, 4, true, true> : ss2d_forward_kernel<T, 4, false, true>;
      return shared ? ss2d_forward_kernel<T, 4, true, false> : ss2d_forward_kernel<T, 4, false, false>;
    case 8:
      return shared ? ss2d_forward_kernel<T, 8, true, false> : ss2d_forward_kernel<T, 8, false, false>;
    default:
      if (zoh) return shared ? ss2d_forward_kernel<T, 16, true, true> : ss2d_forward_kernel<T, 16, false, true>;
      return shared ? ss2d_forward_kernel<T, 16, true, false> : ss2d_forward_kernel<T, 16, false, false>;
  }
}

Layout layout_of(const SS2DProblem& problem) {
  const bool zoh = problem.discretization == Discretization::zoh;
  Layout layout;
  layout.states_per_thread = problem.states <= 1 && !zoh   ? 1
                             : problem.states <= 4         ? 4
                             : problem.states <= 8 && !zoh ? 8
                                                           : 16;
  layout.lay_over(problem, kMaxThreads);
  layout.shared_bytes =
      2 * kTile * sizeof(TokenPlace) + sizeof(float) * (2 * kTile * (size_t(layout.pitch) + 3 * layout.block_channels) +
                                                        problem.rank * layout.block_channels);
  return layout;
}

Plan plan_of(const SS2DProblem& problem) {
  const Layout layout = layout_of(problem);
  const int resident = with_element(problem, [&](auto element) {
    using T = typename decltype(element)::type;
    return resident_blocks(reinterpret_cast<const void*>(kernel_of<T>(problem, layout.states_per_thread)), layout);
  });
  Plan plan = chunk_plan(problem, layout, problem.modalities * problem.batch * layout.groups, resident);
  if (problem.dtype != DType::f32 && problem.paths > 1)
    plan.sum_at = plan.reserve(problem.modalities * problem.batch * problem.tokens() * problem.channels);
  return plan;
}

}  // namespace

size_t ss2d_forward_workspace(const SS2DProblem& problem) { return plan_of(problem).workspace_floats * sizeof(float); }

void ss2d_forward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DOutputs& outputs, void* workspace,
                  void* stream) {
  const Plan plan = plan_of(problem);
  with_element(problem, [&](auto element) {
    using T = typename decltype(element)::type;
    ForwardParams<T> params{};
    fill_params<T>(params, problem, inputs, plan, static_cast<float*>(workspace));
    params.y = static_cast<T*>(outputs.y);
    params.sum =
        problem.dtype == DType::f32 ? static_cast<float*>(outputs.y) : static_cast<float*>(workspace) + plan.sum_at;
    params.saved_states = static_cast<float*>(outputs.states);
    params.last_state = static_cast<float*>(outputs.last_state);
    launch_cooperative(kernel_of<T>(problem, plan.layout.states_per_thread), plan, params, stream);
    return 0;
  });
}

}  // namespace cuda
}  // namespace diffmf
