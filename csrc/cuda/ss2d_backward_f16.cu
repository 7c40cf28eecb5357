#include "ss2d_backward.cuh"

namespace diffmf {
namespace cuda {

const void* ss2d_backward_kernel_f16(const SS2DProblem& problem, const Layout& layout) {
  return reinterpret_cast<const void*>(kernel_for<true>(problem, layout));
}

}  // namespace cuda
}  // namespace diffmf
