// What the hardware can do at most, for `diffmf bench`. Every probe runs one wave of blocks, each thread with enough
// independent work to hide its own latencies, and touches no global memory in its loop.
//
// The recurrences are the inner loops of ss2d with everything around them removed: a thread owns two channels of 16
// states, B and C of a tile of tokens come as broadcast reads of shared memory, steps and inputs are there as well.
#include "diffmf/probes.h"
#include "launch.cuh"

namespace diffmf {
namespace cuda {
namespace {

constexpr int kThreads = 128, kProbeStates = 16, kProbeChannels = 2, kProbeTile = 8, kChains = 16;

// Keeps what was computed alive: no sum of these probes is ever this number.
__device__ inline void keep(float v, float* sink) {
  if (v == -123.f) *sink = v;
}

template <bool kExp2>
__global__ void __launch_bounds__(kThreads) arithmetic_kernel(int repetitions, float* sink /* [1] */) {
  float v[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) v[i] = 0.01f * static_cast<float>(threadIdx.x + i);
#pragma unroll 4
  for (int r = 0; r < repetitions; ++r)
#pragma unroll
    for (int i = 0; i < kChains; ++i) v[i] = kExp2 ? exp2_fast(-v[i]) : fmaf(v[i], v[i], -0.5f);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += v[i];
  keep(sum, sink);
}

template <bool kOutput, bool kSharedDecay>
__global__ void __launch_bounds__(kThreads) recurrence_kernel(int tiles, float* sink /* [1] */) {
  __shared__ float4 bc[kProbeTile][2][kProbeStates / 4];  // B and C of a token
  __shared__ float2 operands[kProbeTile][2][kThreads];    // step, and step * x, of a thread's two channels
  constexpr int kDecays = kSharedDecay ? 1 : kProbeStates;
  for (int i = threadIdx.x; i < kProbeTile * 2 * kProbeStates; i += kThreads)
    reinterpret_cast<float*>(bc)[i] = 0.01f * static_cast<float>(i % 32);
  for (int t = 0; t < kProbeTile; ++t)
    for (int i = 0; i < 2; ++i) operands[t][i][threadIdx.x] = make_float2(0.01f * threadIdx.x, 0.02f);
  float a[kProbeChannels][kDecays], h[kProbeChannels][kProbeStates] = {}, sum = 0.f;
#pragma unroll
  for (int c = 0; c < kProbeChannels; ++c)
#pragma unroll
    for (int n = 0; n < kDecays; ++n) a[c][n] = -0.1f * static_cast<float>((threadIdx.x + n + c) % 16 + 1);
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile)
#pragma unroll 2
    for (int t = 0; t < kProbeTile; ++t) {
      const float2 steps = operands[t][0][threadIdx.x], inputs = operands[t][1][threadIdx.x];
      const float step[kProbeChannels] = {steps.x, steps.y}, input[kProbeChannels] = {inputs.x, inputs.y};
      float b[kProbeStates], c_row[kProbeStates];
#pragma unroll
      for (int q = 0; q < kProbeStates / 4; ++q) {
        *reinterpret_cast<float4*>(b + 4 * q) = bc[t][0][q];
        if (kOutput) *reinterpret_cast<float4*>(c_row + 4 * q) = bc[t][1][q];
      }
#pragma unroll
      for (int c = 0; c < kProbeChannels; ++c) {
        float decay = 0.f, y[2] = {};
#pragma unroll
        for (int n = 0; n < kProbeStates; ++n) {
          if (!kSharedDecay || n == 0) decay = exp2_fast(step[c] * a[c][kSharedDecay ? 0 : n]);
          h[c][n] = fmaf(decay, h[c][n], input[c] * b[n]);
          if (kOutput) y[n % 2] = fmaf(c_row[n], h[c][n], y[n % 2]);
        }
        if (kOutput) sum += y[0] + y[1];
      }
    }
#pragma unroll
  for (int c = 0; c < kProbeChannels; ++c)
#pragma unroll
    for (int n = 0; n < kProbeStates; ++n) sum += h[c][n];
  keep(sum, sink);
}

// Runs one wave of blocks; `work` is the number of operations of a thread.
int64_t launch(void (*kernel)(int, float*), int repetitions, int64_t work, void* sink, void* stream) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int blocks = multiprocessors * per_multiprocessor;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(repetitions, static_cast<float*>(sink));
  check(cudaGetLastError(), "probe launch");
  return work * blocks * kThreads;
}

}  // namespace

int64_t probe(Probe probe, int repetitions, void* sink, void* stream) {
  const int64_t chains = int64_t{repetitions} * kChains;
  const int64_t steps = int64_t{repetitions} * kProbeTile * kProbeChannels * kProbeStates;
  switch (probe) {
    case Probe::exp2:
      return launch(arithmetic_kernel<true>, repetitions, chains, sink, stream);
    case Probe::fma:
      return launch(arithmetic_kernel<false>, repetitions, chains, sink, stream);
    case Probe::scan_states:
      return launch(recurrence_kernel<false, false>, repetitions, steps, sink, stream);
    case Probe::scan_output:
      return launch(recurrence_kernel<true, false>, repetitions, steps, sink, stream);
    case Probe::shared_scan_states:
      return launch(recurrence_kernel<false, true>, repetitions, steps, sink, stream);
    case Probe::shared_scan_output:
      return launch(recurrence_kernel<true, true>, repetitions, steps, sink, stream);
  }
  throw std::runtime_error("probe: unknown");
}

}  // namespace cuda
}  // namespace diffmf
