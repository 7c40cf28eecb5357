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
// own: no block barriers. Paths are taken in rounds; where an axis has paths of both senses, a round is such a pair:
// two warps walk the same chunk from its two ends and change halves in the middle, behind a barrier of theirs. The
// first to visit a token stores its part of y, later ones add theirs with a reduction that returns nothing, and the
// last one of a 16-bit y reads the sum and writes y; barriers order them, so each element of y is summed in the same
// order on every run.
//
// The kernel takes how a warp scans as its parameter: token by token (ss2d_recurrence.cuh), or a tile at a time by
// matrix products (ss2d_matrix.cuh).
#include <algorithm>
#include <vector>

#include "ss2d_matrix.cuh"
#include "ss2d_recurrence.cuh"

namespace diffmf {
namespace cuda {
namespace {

template <class Scan>
__global__ void __launch_bounds__(32 * Scan::kWarps, 1) ss2d_forward_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ float4 shared_base[];
  const auto grid = cooperative_groups::this_grid();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, in_warp = threadIdx.x % 32;
  const Seat seat = {in_warp & (p.state_lanes - 1), (in_warp >> p.lane_shift) * Scan::kChannels, in_warp % kTokenLanes,
                     in_warp / kTokenLanes, reinterpret_cast<char*>(shared_base) + warp * p.warp_bytes};
  const int64_t plane = int64_t{p.states} * p.channels;
  const int tasks = p.modalities * p.batch * p.groups * p.chunks;  // (sequence, chunk)

  // Zeros where staged rows are padded: B and C of states that do not exist.
  auto clear = [&] {
    clear_shared(seat.shared, p.warp_bytes, in_warp, 32);
    __syncwarp();
  };
  clear();
  // Of a path of a sequence (modality, batch item, channel block), the last fastest.
  auto track_of = [&](int sequence, int path) { return Track(p, sequence / p.groups, path, sequence % p.groups); };
  // Before the first walk along a track: starts the copies of its first tile, if there is one, and of what its steps
  // and its skip need.
  auto enter = [&](const Track& track, const auto& tiles, Visit visit) {
    __syncwarp();  // nobody reads what the walk before needed
    if (in_warp == 0) *reinterpret_cast<ForwardBases*>(seat.shared + p.bases_at) = ForwardBases(p, track);
    __syncwarp();
    if (tiles.count() > 0) tiles.issue(p, seat, track, visit, 0);
    stage_channels(p, track, reinterpret_cast<float*>(seat.shared + p.channels_at), in_warp, 32, staged_rows(p.rank));
  };

  if (p.chunks > 1) {
    const int summaries = p.chunks - 1, items = tasks / p.chunks * summaries * p.paths;  // nothing enters from the last
    for (int item = warp * gridDim.x + blockIdx.x; item < items; item += gridDim.x * warps) {
      const int nth = item / p.paths, path = item % p.paths, sequence = nth / summaries;
      const Track track = track_of(sequence, path);
      const int chunk = nth - sequence * summaries + (track.reversed ? 1 : 0);
      const Tiles<Scan, false> tiles(track, p.begin_of(chunk), p.begin_of(chunk + 1));
      enter(track, tiles, {});
      Scan scan(p, seat, track);
      scan.template advance<false>(p, seat, track, tiles, {});
      const int64_t at = track.mbk(p) * p.chunks + chunk;
      scan.store(p, seat, p.chunk_state + at * plane);
      scan.store_steps(p, seat, p.chunk_steps + at * p.channels);
    }
    grid.sync();
    prefix_chunks(p, false, reinterpret_cast<float*>(shared_base));
    __syncthreads();
    clear();
    grid.sync();
  }

#pragma unroll 1
  for (int r = 0; r < p.rounds; ++r) {
    if (r > 0) grid.sync();
    const bool pair = p.round[r].path[1] >= 0;
    const int path = p.round[r].path[pair ? warp % 2 : 0];
    const int unit = pair ? warp / 2 : warp, units = pair ? warps / 2 : warps;  // each takes a task at a time
    for (int task = unit * gridDim.x + blockIdx.x; task < tasks; task += gridDim.x * units) {
      const Track track = track_of(task / p.chunks, path);
      const int chunk = task % p.chunks;
      const int begin = p.begin_of(chunk), end = p.begin_of(chunk + 1);
      const int middle = min(begin + (end - begin + 2 * kTile - 1) / (2 * kTile) * kTile, end);
      auto half_of = [&](int part) {
        const bool upper = (part == 1) != track.reversed;
        return Tiles<Scan, true>(track, upper ? middle : begin, upper ? end : middle);
      };
      auto visit_of = [&](int part) {
        return Visit{r == 0 && (part == 0 || !pair), r == p.rounds - 1 && (part == 1 || !pair)};
      };
      enter(track, half_of(0), visit_of(0));
      Scan scan(p, seat, track);
      if (p.chunks > 1) scan.load(p, seat, p.chunk_state + (track.mbk(p) * p.chunks + chunk) * plane);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const Tiles<Scan, true> tiles = half_of(part);
        if (tiles.count() > 0) {
          __syncwarp();  // nobody reads the tile before
          if (part == 1) tiles.issue(p, seat, track, visit_of(part), 0);
          scan.template advance<true>(p, seat, track, tiles, visit_of(part));
        }
        if (pair) asm volatile("bar.sync %0, 64;" ::"r"(1 + unit) : "memory");  // the other warp's half is written
      }
      const bool final_chunk = chunk == (track.reversed ? 0 : p.chunks - 1);
      if (p.last_state != nullptr && final_chunk) scan.store(p, seat, p.last_state + track.mbk(p) * plane);
    }
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
    if (rank <= 2) return ss2d_forward_kernel<Recurrence<NS, CH, kSharedDecay, false, 2>>;
  }
  return ss2d_forward_kernel<Recurrence<NS, CH, kSharedDecay, false, most_held(NS)>>;
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
template <bool kSharedDecay>
ForwardKernel shared_kernel(const Share& share) {
  if (share.channels != 2) return nullptr;
  if (share.states == 16) return ss2d_forward_kernel<Recurrence<16, 2, kSharedDecay, false, 0>>;
  if (share.states == 4) return ss2d_forward_kernel<Recurrence<4, 2, kSharedDecay, false, 0>>;
  if constexpr (!kSharedDecay) {
    if (share.states == 1) return ss2d_forward_kernel<Recurrence<1, 2, kSharedDecay, false, 0>>;
  }
  return nullptr;
}
ForwardKernel zoh_kernel(const Share& share) {
  if (share.states == 16 && share.channels == 1) return ss2d_forward_kernel<Recurrence<16, 1, false, true, 0>>;
  if (share.states == 8 && share.channels == 1) return ss2d_forward_kernel<Recurrence<8, 1, false, true, 0>>;
  if (share.states == 4) return ss2d_forward_kernel<Recurrence<4, 2, false, true, 0>>;
  return nullptr;
}
bool is_alone(const SS2DProblem& problem, const Share& share) {
  return share.states >= problem.states && problem.channels % share.channels == 0 && problem.rank > 0 &&
         problem.rank <= most_held(share.states) && problem.softplus && problem.discretization == Discretization::euler;
}
// See ForwardParams::whole.
bool is_whole(const SS2DProblem& problem, const Layout& layout, const ForwardParams& params) {
  return layout.state_lanes == 1 && problem.states == layout.states_per_thread &&
         problem.channels % layout.block_channels == 0 && params.x.granule == 16 && params.proj.granule >= 4 &&
         (problem.rank > 0 || params.delta.granule == 16) && params.sum_granule == 16;
}
// A shared decay by matrix products: the share of a warp, which is alone with its channels.
bool is_matrix(const SS2DProblem& problem) {
  return has_shared_decay(problem) && problem.discretization == Discretization::euler && problem.states > 16 &&
         problem.states <= 64;
}
Share matrix_share(const SS2DProblem& problem) {
  if (problem.states > 32) return {64, 16};
  return {32, problem.channels > 16 ? 32 : 16};
}
ForwardKernel matrix_kernel(const Share& share) {
  if (share.states == 64) return ss2d_forward_kernel<MatrixForm<1, 8>>;
  return share.channels == 32 ? ss2d_forward_kernel<MatrixForm<2, 4>> : ss2d_forward_kernel<MatrixForm<1, 4>>;
}
// Null where it was not compiled.
ForwardKernel kernel_of(const SS2DProblem& problem, const Share& share) {
  if (is_matrix(problem)) return matrix_kernel(share);
  const bool shared_decay = has_shared_decay(problem);
  if (problem.discretization == Discretization::zoh && !shared_decay) return zoh_kernel(share);
  if (is_alone(problem, share))
    return shared_decay ? alone_kernel<true>(share, problem.rank) : alone_kernel<false>(share, problem.rank);
  return shared_decay ? shared_kernel<true>(share) : shared_kernel<false>(share);
}

// The share with the least work for a token among those with so many states at most: instructions per state, channel
// and warp, estimated; more where threads share a channel, less where no tile is partly filled (ForwardParams::whole).
Layout layout_of(const SS2DProblem& problem, int most_states) {
  Layout best{};
  auto take = [&](const Share& share, int lanes, int block_channels) {
    best.states_per_thread = share.states;
    best.channels_per_thread = share.channels;
    best.state_lanes = lanes;
    best.block_channels = block_channels;
    best.groups = static_cast<int>(ceil_div(problem.channels, block_channels));
    best.finish(problem);
  };
  if (is_matrix(problem)) {
    const Share share = matrix_share(problem);
    take(share, 1, share.channels);
    return best;
  }
  const double of_state = has_shared_decay(problem) ? 3.0 : 5.0;
  double least = 0;
  for (const Share& share : kShares) {
    if (share.states > most_states || kernel_of(problem, share) == nullptr) continue;
    int lanes = 1;
    while (share.states * lanes < problem.states) lanes *= 2;
    if (lanes > 32) continue;
    const int block_channels = 32 / lanes * share.channels;
    const int64_t groups = ceil_div(problem.channels, block_channels);
    const bool fills = lanes == 1 && share.states == problem.states && problem.channels % block_channels == 0;
    const double of_warp =
        of_state * share.states * share.channels + 20.0 * share.channels / lanes + (lanes > 1 ? 33.0 : 26.0);
    const double work = groups * of_warp * (fills ? 0.85 : 1.0);
    if (least > 0 && work >= least) continue;
    least = work;
    take(share, lanes, block_channels);
  }
  return best;
}

// Shared memory of a warp.
void lay_out(const SS2DProblem& problem, const Layout& layout, ForwardParams& params) {
  const int element = problem.dtype == DType::f32 ? 4 : 2;
  const bool matrix = is_matrix(problem);
  const bool alone = is_alone(problem, {layout.states_per_thread, layout.channels_per_thread});
  // Matrix products read several tokens at once: 16 bytes between them, so that they are in different banks.
  params.x_pitch = layout.block_channels + (matrix ? 16 / element : 0);
  SharedBytes shared;
  params.bases_at = shared.reserve(sizeof(ForwardBases));
  params.offsets_at = shared.reserve(2 * kTile * 8);
  params.rows_at = shared.reserve(2 * kTile * layout.pitch * element);
  params.decoded_at = element == 2 ? shared.reserve(kTile * (layout.pitch + layout.block_channels) * 4) : 0;
  params.x_at = shared.reserve(2 * kTile * params.x_pitch * element);
  params.sum_at = element == 2 ? shared.reserve(2 * kTile * layout.block_channels * 4) : 0;
  params.delta_at = problem.rank == 0 ? shared.reserve(2 * kTile * params.x_pitch * element) : 0;
  params.steps_at = alone || matrix ? 0 : shared.reserve(kTile * layout.block_channels * 4);
  params.channels_at = shared.reserve(staged_rows(static_cast<int>(problem.rank)) * layout.block_channels * 4);
  params.warp_bytes = shared.count;
}

Plan plan_of(const SS2DProblem& problem, ForwardParams& params) {
  params.rounds = 0;
  int task_warps = 1;
  for (int axis = 0; axis < 2; ++axis) {
    std::vector<int> senses[2];
    for (int k = 0; k < problem.paths; ++k)
      if ((problem.path[k] & 1) == axis) senses[problem.path[k] >= 2].push_back(k);
    const size_t pairs = std::min(senses[0].size(), senses[1].size());
    for (size_t i = 0; i < pairs; ++i) params.round[params.rounds++] = {{senses[0][i], senses[1][i]}};
    if (pairs > 0) task_warps = 2;
    for (const auto& paths : senses)
      for (size_t i = pairs; i < paths.size(); ++i) params.round[params.rounds++] = {{paths[i], -1}};
  }
  Layout layout;
  int64_t multiprocessors = 0, most = 0;  // most: warps that a multiprocessor holds
  auto choose = [&](const Layout& chosen) {
    layout = chosen;
    lay_out(problem, layout, params);
    const Share share = {layout.states_per_thread, layout.channels_per_thread};
    const Device& device = device_for(reinterpret_cast<const void*>(kernel_of(problem, share)));
    multiprocessors = device.multiprocessors;
    most = std::min(device.threads / 32, device.shared_bytes / params.warp_bytes) / 2 * 2;
    if (most < 2)
      throw std::runtime_error("ss2d: a warp needs " + std::to_string(params.warp_bytes) +
                               " bytes of shared memory, more than half of what this device has");
  };
  choose(layout_of(problem, 16));
  // Where even the shortest chunks of threads with fewer states are few enough to be walked at once, by 12 warps of
  // each multiprocessor: such warps, if a quarter of the states or less is theirs, are sooner done with a token.
  const Layout narrow = layout_of(problem, 4);
  const int64_t shortest = problem.modalities * problem.batch * narrow.groups * ceil_div(problem.tokens(), 2 * kTile);
  if (narrow.state_lanes >= 4 * layout.state_lanes && shortest * task_warps <= multiprocessors * 12) choose(narrow);
  // Chunks are walked twice, so a third of the device without them is as good as all of it with them.
  Plan plan = chunk_plan(problem, layout, problem.modalities * problem.batch * layout.groups,
                         multiprocessors * most / task_warps, 3, 2 * kTile);
  // As many warps as have work at once, evenly over the multiprocessors; summaries are a warp's work each.
  const int64_t busy = std::max(plan.tasks * task_warps, plan.chunks > 1 ? plan.tasks * problem.paths : 0);
  const int64_t warps = std::min<int64_t>(most, ceil_div(ceil_div(busy, multiprocessors), 2) * 2);
  plan.layout.threads = static_cast<int>(32 * warps);
  plan.layout.shared_bytes = size_t(params.warp_bytes) * warps;
  plan.grid = std::min(multiprocessors, ceil_div(busy, warps));
  if (problem.dtype != DType::f32 && problem.paths > 1)
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
  params.sum_granule = granule_of(params.sum, problem.channels * 4, plan.layout.block_channels * 4);
  params.whole = is_whole(problem, plan.layout, params);
  params.channel_shift = shift_of(plan.layout.block_channels);
  params.saved_states = static_cast<float*>(outputs.states);
  params.last_state = static_cast<float*>(outputs.last_state);
  const ForwardKernel kernel = kernel_of(problem, {plan.layout.states_per_thread, plan.layout.channels_per_thread});
  launch_cooperative(reinterpret_cast<const void*>(kernel), plan, params, stream);
}

}  // namespace cuda
}  // namespace diffmf
