// Host side of the backward pass of ss2d: how the work is cut, and the launch.
#include <algorithm>
#include <limits>

#include "ss2d_backward.cuh"

namespace diffmf {
namespace cuda {
namespace {

const void* kernel_of(const SS2DProblem& problem, const Layout& layout) {
  return problem.dtype == DType::f32 ? ss2d_backward_kernel_f32(problem, layout)
                                     : ss2d_backward_kernel_f16(problem, layout);
}

// Blocks of at most `most_threads`.
Layout layout_of(const SS2DProblem& problem, int most_threads) {
  const bool zoh = problem.discretization == Discretization::zoh;
  Layout layout;
  layout.states_per_thread = problem.states <= 1 && !zoh ? 1 : problem.states <= 128 ? 4 : 8;
  layout.channels_per_thread = layout.states_per_thread == 8 ? 1 : 2;
  layout.state_lanes = 1;
  while (layout.states_per_thread * layout.state_lanes < problem.states) layout.state_lanes *= 2;
  // Whole warps, blocks of channels of equal size.
  const int64_t threads = ceil_div(problem.channels, layout.channels_per_thread) * layout.state_lanes;
  const int64_t groups = ceil_div(threads, most_threads);
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
  stage.by_parts = FastDiv(static_cast<uint32_t>(layout.threads / tokens));
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
  const bool pairs = with_x || holds_decays(problem);
  stage.token_at = shared.reserve(tokens * (pairs ? params.twin : params.single) * 4);
  return stage;
}

// Shared memory of a block; its size goes to the layout.
void lay_out(const SS2DProblem& problem, Layout& layout, BackwardParams& params) {
  const int channels = layout.block_channels, rank = static_cast<int>(problem.rank);
  const int known = known_channels(layout.state_lanes, layout.channels_per_thread),
            spaced = known > 0 ? known : channels;
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
  if (holds_decays(problem)) params.steps_at = shared.reserve(kTile * params.single * 4);
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

// See BackwardParams::whole. Offsets within an image take 32 bits then.
bool is_whole(const SS2DProblem& problem, const Layout& layout, const BackwardParams& params) {
  const int single = params.single * params.element();
  auto can_copy = [&](const Activation& activation, int granule) {
    return activation.granule >= granule && problem.tokens() * activation.pixel <= std::numeric_limits<uint32_t>::max();
  };
  return problem.states == layout.states_per_thread * layout.state_lanes && single % 16 == 0 &&
         can_copy(params.x, 16) && can_copy(params.dy, 16) && can_copy(params.proj, 4) &&
         (problem.rank > 0 || can_copy(params.delta, 16));
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

int64_t longest_chunk(const SS2DProblem& problem, const Plan& plan) {
  return ceil_div(ceil_div(problem.tokens(), plan.granule), plan.chunks) * plan.granule;
}

BackwardPlan plan_with(const SS2DProblem& problem, const Layout& layout, int64_t resident, int64_t splits,
                       bool all_paths) {
  const int64_t images = (shares_source(problem) ? 1 : problem.modalities) * problem.batch;
  const int64_t per_task = shares_source(problem) ? 2 : 1, at_once = all_paths ? problem.paths : 1;
  // Chunks that begin between saved states make walks longer, by about 16 tokens each.
  const int64_t sequences = images * splits * at_once,
                piece = std::max<int64_t>(checkpoint_of(problem.states), kWideTile);
  BackwardPlan plan{chunk_plan(problem, layout, sequences, resident, 2, piece)};
  const BackwardPlan finer{chunk_plan(problem, layout, sequences, resident, 2, kWideTile)};
  if (longest_chunk(problem, finer) + 16 < longest_chunk(problem, plan)) plan = finer;
  plan.splits = splits;
  plan.share = ceil_div(layout.groups, splits);
  plan.all_paths = all_paths;
  // Tasks of phase 1; they take about two fifths of the time, and what comes before and after a walk about that of 16
  // tokens.
  const int64_t summaries = problem.modalities * problem.batch * layout.groups * problem.paths * (plan.chunks - 1);
  plan.cost = (longest_chunk(problem, plan) + 16) *
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
  // High ranks and many states take so much shared memory that smaller blocks fill the device better, by half at least,
  // or are all that fits.
  Layout layout;
  int resident = 0;
  for (int most_threads = kMaxThreads; most_threads >= 32; most_threads /= 2) {
    Layout smaller = layout_of(problem, most_threads);
    lay_out(problem, smaller, params);
    const int blocks = resident_blocks(kernel_of(problem, smaller), smaller);
    if (resident > 0 && 2 * blocks * smaller.threads < 3 * resident * layout.threads) continue;
    layout = smaller;
    resident = blocks;
  }
  if (resident == 0)
    throw std::runtime_error("ss2d: a block needs " + std::to_string(layout.shared_bytes) +
                             " bytes of shared memory, more than this device has");
  lay_out(problem, layout, params);
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
  params.whole = is_whole(problem, plan.layout, params);
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
