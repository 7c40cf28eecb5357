// Runs of pixels, shared out to threads; each run is one part of the parameter gradients.
#include "diffmf/norm_gate.h"

#include <algorithm>

#include "pixels.h"
#include "scratch.h"
#include "team.h"

namespace diffmf::cpu {
namespace {

constexpr int64_t kRun = 512;
constexpr int64_t kElementsPerThread = 1 << 16;  // fewer are not worth starting a thread

int64_t runs(const NormGateProblem& p) { return (p.pixels + kRun - 1) / kRun; }

template <class Function>
void for_runs(const NormGateProblem& p, int threads, Function f) {
  const int64_t elements = p.modalities * p.pixels * p.channels, count = p.modalities * runs(p);
  if (elements == 0) return;
  Team team(static_cast<int>(std::clamp<int64_t>(threads, 1, std::min(count, 1 + elements / kElementsPerThread))));
  Scratch scratch(team.size(), pixel_kernels().norm_scratch(p));
  team.for_each(count, [&](int64_t index, int thread) {
    const int64_t run = index % runs(p);
    f(index / runs(p), run * kRun, std::min((run + 1) * kRun, p.pixels), run, scratch.of(thread));
  });
}

}  // namespace

void norm_gate_forward(const NormGateProblem& problem, const NormGateInputs& inputs, void* out, int threads) {
  for_runs(problem, threads, [&](int64_t m, int64_t first, int64_t last, int64_t, void* scratch) {
    pixel_kernels().norm_forward(problem, inputs, out, m, first, last, scratch);
  });
}

int64_t norm_gate_backward_parts(const NormGateProblem& problem, const NormGateInputs&) { return runs(problem); }

void norm_gate_backward(const NormGateProblem& problem, const NormGateInputs& inputs,
                        const NormGateGradients& gradients, int threads) {
  for_runs(problem, threads, [&](int64_t m, int64_t first, int64_t last, int64_t run, void* scratch) {
    pixel_kernels().norm_backward(problem, inputs, gradients, m, first, last, run, scratch);
  });
}

}  // namespace diffmf::cpu
