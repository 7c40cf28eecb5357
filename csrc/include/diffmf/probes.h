// Small kernels that measure what the hardware can do, for `diffmf bench`: no operator uses them.
#pragma once

#include <cstdint>

namespace diffmf {

enum class Probe {
  exp2,         // the special-function units' 2^v, nothing else
  fma,          // fused multiply-adds, nothing else
  scan_states,  // the bare recurrence h = exp2(step * a) * h + step * x * B of 16 states, as a first pass needs it
  scan_output,  // the same and y += C * h, as a second pass needs it
  shared_scan_states,  // scan_states with one decay for all states
  shared_scan_output,  // scan_output likewise
};

namespace cuda {
// Fills the current device with one wave of blocks that repeat the probe, on `stream` (a cudaStream_t), without
// synchronizing. `sink` is never written but must be one float. Returns the number of operations (of state-steps for
// the recurrences) of the launch. Throws std::runtime_error with CUDA's message on failure.
int64_t probe(Probe, int repetitions, void* sink, void* stream);
}  // namespace cuda

}  // namespace diffmf
