// The Python module diffmf_ops._C: plain addresses and sizes in, no tensor library anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "diffmf/cross_scan.h"
#include "diffmf/depthwise_conv_silu.h"
#include "diffmf/norm_gate.h"
#include "diffmf/probes.h"
#include "diffmf/ss2d.h"

namespace py = pybind11;
using namespace diffmf;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

using StrideList = std::array<int64_t, 5>;
Strides strides(const StrideList& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

SS2DProblem make_problem(DType dtype, const std::array<int64_t, 7>& sizes, const std::vector<int>& paths,
                         Exchange exchange, Discretization discretization, bool shared_decay, bool softplus) {
  SS2DProblem problem{dtype,    sizes[0], sizes[1], sizes[2], sizes[3],       sizes[4],     sizes[5],
                      sizes[6], 0,        {},       exchange, discretization, shared_decay, softplus};
  if (paths.empty() || paths.size() > kMaxPaths)
    throw std::invalid_argument("paths: expected 1 to " + std::to_string(kMaxPaths));
  for (int path : paths) problem.path[problem.paths++] = path;
  return problem;
}

CrossScanProblem make_shape(const std::array<int64_t, 4>& sizes, const std::vector<int>& paths) {
  CrossScanProblem shape{sizes[0], sizes[1], sizes[2], sizes[3], 0, {}};
  if (paths.empty() || paths.size() > kMaxPaths)
    throw std::invalid_argument("paths: expected 1 to " + std::to_string(kMaxPaths));
  for (int path : paths) shape.path[shape.paths++] = path;
  return shape;
}

SS2DInputs make_inputs(uintptr_t x, const StrideList& x_strides, uintptr_t proj, const StrideList& proj_strides,
                       uintptr_t delta, const StrideList& delta_strides, uintptr_t dt_weight, uintptr_t dt_bias,
                       uintptr_t a, uintptr_t d) {
  return {pointer(x),         strides(x_strides),
          pointer(proj),      strides(proj_strides),
          pointer(delta),     strides(delta_strides),
          pointer(dt_weight), pointer(dt_bias),
          pointer(a),         pointer(d)};
}

SS2DOutputs make_outputs(uintptr_t y, uintptr_t states, uintptr_t last_state) {
  return {pointer(y), pointer(states), pointer(last_state)};
}

SS2DGradients make_gradients(uintptr_t dy, uintptr_t states, bool x_per_path, uintptr_t dx, uintptr_t dproj,
                             uintptr_t ddelta, uintptr_t ddt_weight, uintptr_t ddt_bias, uintptr_t da, uintptr_t dd) {
  return {pointer(dy),     pointer(states),     x_per_path,        pointer(dx), pointer(dproj),
          pointer(ddelta), pointer(ddt_weight), pointer(ddt_bias), pointer(da), pointer(dd)};
}

DepthwiseConvInputs make_conv_inputs(uintptr_t x, const StrideList& x_strides, uintptr_t weight, uintptr_t bias) {
  return {pointer(x), strides(x_strides), pointer(weight), pointer(bias)};
}

DepthwiseConvGradients make_conv_gradients(uintptr_t dy, uintptr_t dx, uintptr_t dweight, uintptr_t dbias) {
  return {pointer(dy), pointer(dx), pointer(dweight), pointer(dbias)};
}

NormGateInputs make_norm_inputs(uintptr_t y, const std::array<int64_t, 2>& y_strides, uintptr_t z,
                                const std::array<int64_t, 2>& z_strides, uintptr_t weight, uintptr_t bias) {
  return {pointer(y),   {y_strides[0], y_strides[1]}, pointer(z), {z_strides[0], z_strides[1]}, pointer(weight),
          pointer(bias)};
}

NormGateGradients make_norm_gradients(uintptr_t dout, uintptr_t dy, uintptr_t dz, uintptr_t dweight, uintptr_t dbias) {
  return {pointer(dout), pointer(dy), pointer(dz), pointer(dweight), pointer(dbias)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("checkpoint_of",
        [](bool on_gpu, int64_t states) { return on_gpu ? cuda::checkpoint_of(states) : cpu::kCheckpoint; });
  py::enum_<DType>(m, "DType")
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f64", DType::f64);
  py::enum_<Exchange>(m, "Exchange")
      .value("none", Exchange::none)
      .value("mutual", Exchange::mutual)
      .value("from_visible", Exchange::from_visible)
      .value("from_infrared", Exchange::from_infrared);
  py::enum_<Discretization>(m, "Discretization")
      .value("euler", Discretization::euler)
      .value("zoh", Discretization::zoh);
  py::enum_<Probe>(m, "Probe")
      .value("exp2", Probe::exp2)
      .value("fma", Probe::fma)
      .value("scan_states", Probe::scan_states)
      .value("scan_output", Probe::scan_output)
      .value("shared_scan_states", Probe::shared_scan_states)
      .value("shared_scan_output", Probe::shared_scan_output);

  py::class_<SS2DProblem>(m, "SS2DProblem")
      .def(py::init(&make_problem), py::arg("dtype"), py::arg("sizes"), py::arg("paths"), py::arg("exchange"),
           py::arg("discretization"), py::arg("shared_decay"), py::arg("softplus"));
  py::class_<SS2DInputs>(m, "SS2DInputs").def(py::init(&make_inputs));
  py::class_<SS2DOutputs>(m, "SS2DOutputs").def(py::init(&make_outputs));
  py::class_<SS2DGradients>(m, "SS2DGradients").def(py::init(&make_gradients));

  py::class_<CrossScanProblem>(m, "CrossScanProblem").def(py::init(&make_shape), py::arg("sizes"), py::arg("paths"));

  py::class_<DepthwiseConvProblem>(m, "DepthwiseConvProblem")
      .def(py::init([](DType dtype, const std::array<int64_t, 5>& sizes, int kernel_size) {
             return DepthwiseConvProblem{dtype, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], kernel_size};
           }),
           py::arg("dtype"), py::arg("sizes"), py::arg("kernel_size"));
  py::class_<DepthwiseConvInputs>(m, "DepthwiseConvInputs").def(py::init(&make_conv_inputs));
  py::class_<DepthwiseConvGradients>(m, "DepthwiseConvGradients").def(py::init(&make_conv_gradients));

  py::class_<NormGateProblem>(m, "NormGateProblem")
      .def(py::init([](DType dtype, const std::array<int64_t, 3>& sizes, double eps) {
             return NormGateProblem{dtype, sizes[0], sizes[1], sizes[2], eps};
           }),
           py::arg("dtype"), py::arg("sizes"), py::arg("eps"));
  py::class_<NormGateInputs>(m, "NormGateInputs").def(py::init(&make_norm_inputs));
  py::class_<NormGateGradients>(m, "NormGateGradients").def(py::init(&make_norm_gradients));

  using no_gil_t = py::call_guard<py::gil_scoped_release>;
  const no_gil_t no_gil;
  m.def("ss2d_forward_cpu", &cpu::ss2d_forward, no_gil);
  m.def("ss2d_backward_cpu", &cpu::ss2d_backward, no_gil);
  m.def(
      "cross_scan_cpu",
      [](const CrossScanProblem& shape, int64_t element_size, uintptr_t x, uintptr_t y, int threads) {
        cpu::cross_scan(shape, element_size, pointer(x), pointer(y), threads);
      },
      no_gil);
  m.def(
      "cross_merge_cpu",
      [](const CrossScanProblem& shape, DType dtype, uintptr_t y, uintptr_t x, int threads) {
        cpu::cross_merge(shape, dtype, pointer(y), pointer(x), threads);
      },
      no_gil);
  m.def(
      "depthwise_conv_silu_forward_cpu",
      [](const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, uintptr_t y, int threads) {
        cpu::depthwise_conv_silu_forward(problem, inputs, pointer(y), threads);
      },
      no_gil);
  m.def("depthwise_conv_silu_backward_parts_cpu", &cpu::depthwise_conv_silu_backward_parts);
  m.def("depthwise_conv_silu_backward_cpu", &cpu::depthwise_conv_silu_backward, no_gil);
  m.def(
      "norm_gate_forward_cpu",
      [](const NormGateProblem& problem, const NormGateInputs& inputs, uintptr_t out, int threads) {
        cpu::norm_gate_forward(problem, inputs, pointer(out), threads);
      },
      no_gil);
  m.def("norm_gate_backward_parts_cpu", &cpu::norm_gate_backward_parts);
  m.def("norm_gate_backward_cpu", &cpu::norm_gate_backward, no_gil);

#ifdef DIFFMF_WITH_CUDA
  m.attr("cuda_version") = DIFFMF_CUDA_VERSION;
  m.attr("cuda_archs") = DIFFMF_CUDA_ARCHS;
  m.def("ss2d_forward_workspace_cuda", &cuda::ss2d_forward_workspace);
  m.def(
      "ss2d_forward_cuda",
      [](const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DOutputs& outputs, uintptr_t workspace,
         uintptr_t stream) { cuda::ss2d_forward(problem, inputs, outputs, pointer(workspace), pointer(stream)); },
      no_gil);
  m.def("ss2d_backward_workspace_cuda", &cuda::ss2d_backward_workspace);
  m.def(
      "ss2d_backward_cuda",
      [](const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DGradients& gradients, uintptr_t workspace,
         uintptr_t stream) { cuda::ss2d_backward(problem, inputs, gradients, pointer(workspace), pointer(stream)); },
      no_gil);
  m.def(
      "cross_scan_cuda",
      [](const CrossScanProblem& shape, int64_t element_size, uintptr_t x, uintptr_t y, uintptr_t stream) {
        cuda::cross_scan(shape, element_size, pointer(x), pointer(y), pointer(stream));
      },
      no_gil);
  m.def(
      "cross_merge_cuda",
      [](const CrossScanProblem& shape, DType dtype, uintptr_t y, uintptr_t x, uintptr_t stream) {
        cuda::cross_merge(shape, dtype, pointer(y), pointer(x), pointer(stream));
      },
      no_gil);
  m.def(
      "depthwise_conv_silu_forward_cuda",
      [](const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs, uintptr_t y, uintptr_t stream) {
        cuda::depthwise_conv_silu_forward(problem, inputs, pointer(y), pointer(stream));
      },
      no_gil);
  m.def("depthwise_conv_silu_backward_workspace_cuda", &cuda::depthwise_conv_silu_backward_workspace);
  m.def("depthwise_conv_silu_backward_parts_cuda", &cuda::depthwise_conv_silu_backward_parts);
  m.def(
      "depthwise_conv_silu_backward_cuda",
      [](const DepthwiseConvProblem& problem, const DepthwiseConvInputs& inputs,
         const DepthwiseConvGradients& gradients, uintptr_t workspace, uintptr_t stream) {
        cuda::depthwise_conv_silu_backward(problem, inputs, gradients, pointer(workspace), pointer(stream));
      },
      no_gil);
  m.def(
      "norm_gate_forward_cuda",
      [](const NormGateProblem& problem, const NormGateInputs& inputs, uintptr_t out, uintptr_t stream) {
        cuda::norm_gate_forward(problem, inputs, pointer(out), pointer(stream));
      },
      no_gil);
  m.def("norm_gate_backward_parts_cuda", &cuda::norm_gate_backward_parts);
  m.def(
      "norm_gate_backward_cuda",
      [](const NormGateProblem& problem, const NormGateInputs& inputs, const NormGateGradients& gradients,
         uintptr_t stream) { cuda::norm_gate_backward(problem, inputs, gradients, pointer(stream)); },
      no_gil);
  m.def(
      "probe_cuda",
      [](Probe probe, int repetitions, uintptr_t sink, uintptr_t stream) {
        return cuda::probe(probe, repetitions, pointer(sink), pointer(stream));
      },
      no_gil);
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif
}
