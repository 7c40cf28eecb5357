// Host side of the kernels: errors and small arithmetic; of those of ss2d also block layout, chunking and the
// cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "ss2d_common.cuh"

namespace diffmf {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// log2 of a power of two.
inline int shift_of(int64_t power) {
  int shift = 0;
  while ((int64_t{1} << shift) < power) ++shift;
  return shift;
}

// How a block is laid over channels and states. A thread holds states_per_thread states of channels_per_thread
// neighbouring channels; state_lanes threads share those channels.
struct Layout {
  int states_per_thread, channels_per_thread, state_lanes;
  int block_channels, groups, threads;
  int padded_states, pitch;
  size_t shared_bytes;

  void finish(const SS2DProblem& problem) {
    padded_states = padded_of(states_per_thread * state_lanes);
    pitch = pitch_of(padded_states, static_cast<int>(problem.rank));
  }
};

// Shared memory, handed out in pieces that start on 16 bytes.
struct SharedBytes {
  int count = 0;
  int reserve(int bytes) {
    const int at = count;
    count += static_cast<int>(ceil_div(bytes, 16) * 16);
    return at;
  }
};

struct Plan {
  Layout layout;
  int64_t chunks, granule;  // granule: tokens that chunks are multiples of, but for the last
  int64_t tasks;            // (sequence, chunk)
  int64_t grid;             // blocks
  // Offsets into the workspace, in floats.
  size_t workspace_floats = 0;
  size_t chunk_state_at = 0, chunk_steps_at = 0, sum_at = 0, dproj_sum_at = 0;
  size_t reserve(int64_t floats) {
    const size_t at = workspace_floats;
    workspace_floats += static_cast<size_t>(ceil_div(floats, 4) * 4);
    return at;
  }
};

// What the current device has for blocks of a kernel. Asked once: the answer costs microseconds.
struct Device {
  int number, multiprocessors;
  int threads, shared_bytes;  // of a block, at most
};
inline const Device& device_for(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, Device> known;
  int number = 0;
  check(cudaGetDevice(&number), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({number, kernel});
  if (at != known.end()) return at->second;
  Device device;
  device.number = number;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  device.threads = attributes.maxThreadsPerBlock;
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number),
        "cudaDeviceGetAttribute");
  // All that a block may have, whatever one layout needs: another layout of the same kernel may need more. Or
  // DIFFMF_SHARED_BYTES if that is less, to try what smaller devices have.
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number),
        "cudaDeviceGetAttribute");
  if (const char* limit = std::getenv("DIFFMF_SHARED_BYTES"))
    device.shared_bytes = std::min(device.shared_bytes, std::atoi(limit));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes),
        "cudaFuncSetAttribute");
  return known[{number, kernel}] = device;
}

// Blocks of this kernel that the current device holds at once, asked once likewise; 0 where one does not fit.
inline int resident_blocks(const void* kernel, const Layout& layout) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const Device& device = device_for(kernel);
  if (layout.shared_bytes > static_cast<size_t>(device.shared_bytes)) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device.number, kernel, layout.threads, layout.shared_bytes}];
  if (blocks > 0) return blocks;
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, layout.threads, layout.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks = device.multiprocessors * per_multiprocessor;
}

// Cuts the axis so that `sequences` fill the device, which holds `resident` tasks (one chunk of one sequence) at once.
// Chunking costs a second pass over the data, so it pays only where fewer than 1 / `least` of the device would have
// work without it. Chunks differ by a granule at most.
inline Plan chunk_plan(const SS2DProblem& problem, const Layout& layout, int64_t sequences, int64_t resident,
                       int64_t least, int64_t granule) {
  Plan plan;
  plan.layout = layout;
  const int64_t wanted = sequences * least > resident ? 1 : resident / std::max<int64_t>(sequences, 1);
  plan.chunks = std::max<int64_t>(1, std::min(wanted, ceil_div(problem.tokens(), granule)));
  plan.granule = granule;
  plan.tasks = sequences * plan.chunks;
  if (plan.chunks > 1) {
    const int64_t summaries = problem.modalities * problem.batch * problem.paths * plan.chunks * problem.channels;
    plan.chunk_state_at = plan.reserve(summaries * problem.states);
    plan.chunk_steps_at = plan.reserve(summaries);
  }
  return plan;
}

// The greatest power of two, at most 16, that divides all of them: what one copy can move.
template <typename... Counts>
int granule_of(const void* data, Counts... counts) {
  const uint64_t bits =
      (static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data)) | ... | static_cast<uint64_t>(counts)) | 16;
  return static_cast<int>(bits & (~bits + 1));
}

// `bytes` are the lengths of the runs that are copied from a pixel.
template <typename... Bytes>
Activation activation(const SS2DProblem& problem, const void* data, const Strides& strides, int element,
                      const char* name, Bytes... bytes) {
  if (data == nullptr) return {};
  const int64_t pixel = (problem.width > 1 ? strides.column : strides.row) * element;
  if ((problem.width > 1 && problem.height > 1 && strides.row != problem.width * strides.column) ||
      pixel != static_cast<int>(pixel))
    throw std::runtime_error(std::string("ss2d: the pixels of ") + name + " are not equally spaced");
  Activation result = {static_cast<const char*>(data), strides.modality * element, strides.batch * element,
                       strides.path * element,         static_cast<int>(pixel),    0};
  result.granule = granule_of(data, result.modality, result.batch, result.path, pixel, bytes...);
  return result;
}

// A is [M, K, D, 1] and there are several states to share it.
inline bool has_shared_decay(const SS2DProblem& problem) { return problem.shared_decay && problem.states > 1; }

inline void fill_params(Params& params, const SS2DProblem& problem, const SS2DInputs& inputs, const Plan& plan,
                        float* workspace) {
  params.modalities = static_cast<int>(problem.modalities);
  params.batch = static_cast<int>(problem.batch);
  params.paths = problem.paths;
  params.channels = static_cast<int>(problem.channels);
  params.states = static_cast<int>(problem.states);
  params.rank = static_cast<int>(problem.rank);
  params.tokens = static_cast<int>(problem.tokens());
  params.width = static_cast<int>(problem.width);
  params.checkpoint_shift = shift_of(checkpoint_of(problem.states));
  params.by_height = FastDiv(static_cast<uint32_t>(problem.height));
  std::copy(problem.path, problem.path + problem.paths, params.path);
  params.exchange = problem.exchange;
  params.softplus = problem.softplus;
  params.zoh = problem.discretization == Discretization::zoh;
  params.shared_decay = has_shared_decay(problem);
  params.dtype = problem.dtype;
  params.half = problem.dtype != DType::f32;
  const Layout& layout = plan.layout;
  params.block_channels = layout.block_channels;
  params.state_lanes = layout.state_lanes;
  params.lane_shift = shift_of(layout.state_lanes);
  params.groups = layout.groups;
  params.padded_states = layout.padded_states;
  params.pitch = layout.pitch;
  params.chunks = static_cast<int>(plan.chunks);
  params.granule = static_cast<int>(plan.granule);
  const int64_t granules = ceil_div(problem.tokens(), plan.granule);
  params.shortest = static_cast<int>(granules / plan.chunks);
  params.longer = static_cast<int>(granules % plan.chunks);
  params.by_chunks = FastDiv(static_cast<uint32_t>(plan.chunks));
  const int element = params.element();
  const int64_t block_bytes = int64_t{layout.block_channels} * element, row_bytes = problem.channels * element;
  params.x = activation(problem, inputs.x, inputs.x_strides, element, "x", block_bytes, row_bytes);
  params.pairs = params.half && problem.states == 1 && layout.states_per_thread == 1;
  params.proj = activation(problem, inputs.proj, inputs.proj_strides, element, "proj", problem.rank * element,
                           params.pairs ? 4 : problem.states * element);
  params.delta = activation(problem, inputs.delta, inputs.delta_strides, element, "delta", block_bytes, row_bytes);
  params.dt_weight = static_cast<const float*>(inputs.dt_weight);
  params.dt_bias = static_cast<const float*>(inputs.dt_bias);
  params.a = static_cast<const float*>(inputs.a);
  params.d = static_cast<const float*>(inputs.d);
  params.chunk_state = workspace + plan.chunk_state_at;
  params.chunk_steps = workspace + plan.chunk_steps_at;
}

template <typename P>
void launch_cooperative(const void* kernel, const Plan& plan, P& params, void* stream) {
  void* arguments[] = {&params};
  check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(plan.grid)),
                                    dim3(static_cast<unsigned>(plan.layout.threads)), arguments,
                                    plan.layout.shared_bytes, static_cast<cudaStream_t>(stream)),
        "ss2d launch");
}

}  // namespace cuda
}  // namespace diffmf
