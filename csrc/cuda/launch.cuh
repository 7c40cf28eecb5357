// Host side of the ss2d kernels: block layout, chunking and the cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layout {
  int states_per_thread;
  int state_lanes, block_channels, groups, threads, padded_states, pitch, row_shift;
  size_t shared_bytes;

  // Everything from states_per_thread: at most max_threads threads, whole warps, channel blocks of equal size.
  void lay_over(const SS2DProblem& problem, int max_threads) {
    state_lanes = 1;
    while (states_per_thread * state_lanes < problem.states) state_lanes *= 2;
    const int64_t granule = std::max(1, 32 / state_lanes);  // channels that fill a warp
    groups = static_cast<int>(ceil_div(problem.channels, max_threads / state_lanes));
    block_channels = static_cast<int>(ceil_div(ceil_div(problem.channels, groups), granule) * granule);
    groups = static_cast<int>(ceil_div(problem.channels, block_channels));
    threads = block_channels * state_lanes;
    padded_states = states_per_thread * state_lanes;
    const int64_t row = problem.rank + 2 * problem.states;
    pitch = static_cast<int>(ceil_div(2 * padded_states + problem.rank, 4) * 4);
    // Lanes per row so that the fewest loads, counted per thread, cover a tile.
    int64_t fewest = std::numeric_limits<int64_t>::max();
    for (int shift = 0; shift <= 5; ++shift) {
      const int64_t loads = ceil_div(kTile, threads >> shift) * ceil_div(row, 1 << shift);
      if (loads <= fewest) {
        fewest = loads;
        row_shift = shift;
      }
    }
  }
};

struct Plan {
  Layout layout;
  int64_t chunk, chunks;
  int64_t grid;  // blocks
  // Offsets into the workspace, in floats.
  size_t workspace_floats = 0;
  size_t chunk_state_at = 0, chunk_steps_at = 0, sum_at = 0, dproj_sum_at = 0;
  size_t reserve(int64_t floats) {
    const size_t at = workspace_floats;
    workspace_floats += static_cast<size_t>(ceil_div(floats, 4) * 4);
    return at;
  }
};

// Blocks of this kernel that the current device holds at once.
inline int resident_blocks(const void* kernel, const Layout& layout) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (layout.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(layout.shared_bytes)),
          "cudaFuncSetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, layout.threads, layout.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (per_multiprocessor < 1)
    throw std::runtime_error("ss2d: a block needs " + std::to_string(layout.shared_bytes) +
                             " bytes of shared memory, more than this device has");
  return multiprocessors * per_multiprocessor;
}

// Cuts the axis so that `sequences` (tasks of one chunk) fill the device once. Chunking costs a second pass over the
// data, so it pays only where fewer than half of the resident blocks would have work without it.
inline Plan chunk_plan(const SS2DProblem& problem, const Layout& layout, int64_t sequences, int resident) {
  Plan plan;
  plan.layout = layout;
  const int64_t wanted = sequences * 2 > resident ? 1 : resident / std::max<int64_t>(sequences, 1);
  plan.chunk = std::max(int64_t{1}, ceil_div(ceil_div(problem.tokens(), wanted), kCheckpoint)) * kCheckpoint;
  plan.chunks = ceil_div(problem.tokens(), plan.chunk);
  const int64_t tasks = sequences * plan.chunks * (plan.chunks > 1 ? problem.paths : 1);
  plan.grid = std::max<int64_t>(1, std::min<int64_t>(resident, tasks));
  if (plan.chunks > 1) {
    const int64_t summaries = problem.modalities * problem.batch * problem.paths * plan.chunks * problem.channels;
    plan.chunk_state_at = plan.reserve(summaries * problem.states);
    plan.chunk_steps_at = plan.reserve(summaries);
  }
  return plan;
}

template <typename T>
void fill_params(Params<T>& params, const SS2DProblem& problem, const SS2DInputs& inputs, const Plan& plan,
                 float* workspace) {
  params.modalities = static_cast<int>(problem.modalities);
  params.batch = static_cast<int>(problem.batch);
  params.paths = problem.paths;
  params.channels = static_cast<int>(problem.channels);
  params.states = static_cast<int>(problem.states);
  params.rank = static_cast<int>(problem.rank);
  params.tokens = static_cast<int>(problem.tokens());
  params.width = static_cast<int>(problem.width);
  params.by_width = FastDiv(static_cast<uint32_t>(problem.width));
  params.by_height = FastDiv(static_cast<uint32_t>(problem.height));
  std::copy(problem.path, problem.path + problem.paths, params.path);
  int filled = 0;
  for (int axis = 0; axis < 2; ++axis) {
    for (int k = 0; k < problem.paths; ++k)
      if ((problem.path[k] & 1) == axis) params.order[filled++] = k;
    if (axis == 0) params.row_paths = filled;
  }
  params.exchange = problem.exchange;
  params.softplus = problem.softplus;
  params.is_bf16 = problem.dtype == DType::bf16;
  const Layout& layout = plan.layout;
  params.block_channels = layout.block_channels;
  params.state_lanes = layout.state_lanes;
  params.groups = layout.groups;
  params.padded_states = layout.padded_states;
  params.pitch = layout.pitch;
  params.row_shift = layout.row_shift;
  params.chunk = static_cast<int>(plan.chunk);
  params.chunks = static_cast<int>(plan.chunks);
  params.x = static_cast<const T*>(inputs.x);
  params.proj = static_cast<const T*>(inputs.proj);
  params.delta = static_cast<const T*>(inputs.delta);
  params.x_strides = inputs.x_strides;
  params.proj_strides = inputs.proj_strides;
  params.delta_strides = inputs.delta_strides;
  params.dt_weight = static_cast<const float*>(inputs.dt_weight);
  params.dt_bias = static_cast<const float*>(inputs.dt_bias);
  params.a = static_cast<const float*>(inputs.a);
  params.d = static_cast<const float*>(inputs.d);
  params.chunk_state = workspace + plan.chunk_state_at;
  params.chunk_steps = workspace + plan.chunk_steps_at;
}

// A is [M, K, D, 1] and there are several states to share it.
inline bool has_shared_decay(const SS2DProblem& problem) { return problem.shared_decay && problem.states > 1; }

// Calls f with a tag of the kernels' element type.
template <typename T>
struct Element {
  using type = T;
};
template <typename F>
auto with_element(const SS2DProblem& problem, F&& f) {
  switch (problem.dtype) {
    case DType::f32:
      return f(Element<float>{});
    case DType::bf16:
    case DType::f16:
      return f(Element<Half16>{});
    default:
      throw std::runtime_error("ss2d: float64 runs on the CPU only");
  }
}

template <typename P>
void launch_cooperative(void (*kernel)(P), const Plan& plan, P& params, void* stream) {
  void* arguments[] = {&params};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(plan.grid)),
                                    dim3(static_cast<unsigned>(plan.layout.threads)), arguments,
                                    plan.layout.shared_bytes, static_cast<cudaStream_t>(stream)),
        "ss2d launch");
}

}  // namespace cuda
}  // namespace diffmf
