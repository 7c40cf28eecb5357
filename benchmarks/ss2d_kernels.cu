// The ss2d kernels by themselves, without Python and PyTorch: a program that is built where nvcc is and run where the
// GPU is, to compare several states of csrc/cuda in one run.
//
//   cmake -S . -B build -G Ninja -DDIFFMF_CUDA=on -DDIFFMF_CUDA_ARCHS=90-real && cmake --build build -t ss2d_kernels
//   build/ss2d_kernels check CASE...         against the float64 CPU kernels: relative errors of y, the last state and
//                                            every gradient; exit code 1 if one is out of tolerance
//   build/ss2d_kernels time REPEATS CASE...  medians in microseconds: forward, forward with saved states, backward; the
//                                            second-level cache is overwritten before every call
//
// CASE: MxBxHxWxDxNxR,DTYPE[,scalar_a][,zoh][,linear][,x_per_path][,one_path][,mutual|from_visible|from_infrared]
// with M modalities, B images, D channels, N states, rank R (0: a step per channel is given); DTYPE f32, bf16 or f16;
// linear: no softplus.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "diffmf/ss2d.h"

using namespace diffmf;

namespace {

using Values = std::vector<double>;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

struct Case {
  std::string name;
  SS2DProblem problem{};
  bool x_per_path = false;

  explicit Case(const std::string& text) : name(text) {
    problem.paths = 4;
    for (int k = 0; k < problem.paths; ++k) problem.path[k] = k;
    problem.softplus = true;
    std::stringstream words(text);
    std::string word, dtype;
    std::getline(words, word, ',');
    std::getline(words, dtype, ',');
    int m, b, h, w, d, n, r;
    if (std::sscanf(word.c_str(), "%dx%dx%dx%dx%dx%dx%d", &m, &b, &h, &w, &d, &n, &r) != 7)
      throw std::runtime_error("case '" + text + "' begins with '" + word + "'; expected MxBxHxWxDxNxR");
    problem.modalities = m, problem.batch = b, problem.height = h, problem.width = w;
    problem.channels = d, problem.states = n, problem.rank = r;
    if (dtype != "f32" && dtype != "bf16" && dtype != "f16")
      throw std::runtime_error("case '" + text + "' has dtype '" + dtype + "'; expected f32, bf16 or f16");
    problem.dtype = dtype == "f32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f16;
    while (std::getline(words, word, ',')) {
      if (word == "scalar_a") {
        problem.shared_decay = true;
      } else if (word == "zoh") {
        problem.discretization = Discretization::zoh;
      } else if (word == "linear") {
        problem.softplus = false;
      } else if (word == "x_per_path") {
        x_per_path = true;
      } else if (word == "one_path") {
        problem.paths = 1;
      } else if (word == "mutual") {
        problem.exchange = Exchange::mutual;
      } else if (word == "from_visible") {
        problem.exchange = Exchange::from_visible;
      } else if (word == "from_infrared") {
        problem.exchange = Exchange::from_infrared;
      } else {
        throw std::runtime_error("case '" + text + "' has the unknown word '" + word + "'");
      }
    }
  }
};

size_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
double rounded(float value, DType dtype) {
  return dtype == DType::f32    ? value
         : dtype == DType::bf16 ? __bfloat162float(__float2bfloat16_rn(value))
                                : __half2float(__float2half_rn(value));
}

// Device memory for values of a dtype. Without values it is filled with NaN.
class Tensor {
 public:
  DType dtype;
  size_t count;
  void* data = nullptr;

  Tensor(DType dtype, size_t count) : dtype(dtype), count(count) {
    if (count == 0) return;
    check(cudaMalloc(&data, count * bytes_of(dtype)));
    check(cudaMemset(data, 0xff, count * bytes_of(dtype)));
  }
  Tensor(DType dtype, const Values& values) : Tensor(dtype, values.size()) {
    std::vector<char> raw(count * bytes_of(dtype));
    for (size_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(values[i]);
      if (dtype == DType::f32) {
        reinterpret_cast<float*>(raw.data())[i] = value;
      } else if (dtype == DType::bf16) {
        reinterpret_cast<__nv_bfloat16*>(raw.data())[i] = __float2bfloat16_rn(value);
      } else {
        reinterpret_cast<__half*>(raw.data())[i] = __float2half_rn(value);
      }
    }
    if (count > 0) check(cudaMemcpy(data, raw.data(), raw.size(), cudaMemcpyHostToDevice));
  }
  Tensor(Tensor&& other) : dtype(other.dtype), count(other.count), data(std::exchange(other.data, nullptr)) {}
  ~Tensor() { cudaFree(data); }

  Values values() const {
    std::vector<char> raw(count * bytes_of(dtype));
    if (count > 0) check(cudaMemcpy(raw.data(), data, raw.size(), cudaMemcpyDeviceToHost));
    Values values(count);
    for (size_t i = 0; i < count; ++i)
      values[i] = dtype == DType::f32    ? reinterpret_cast<const float*>(raw.data())[i]
                  : dtype == DType::bf16 ? __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(raw.data())[i])
                                         : __half2float(reinterpret_cast<const __half*>(raw.data())[i]);
    return values;
  }
};

// Inputs as a fresh model has them: steps between 0.001 and 0.1, A near -1, -2, ... -N.
struct Inputs {
  Values x, proj, delta, dt_weight, dt_bias, a, d, dy;
  SS2DInputs layout{};  // strides; no data
  size_t states = 0;    // of all sequences

  Inputs(const Case& c, std::mt19937& random) {
    const SS2DProblem& p = c.problem;
    const int64_t pixels = p.modalities * p.batch * p.tokens(), row = p.rank + 2 * p.states;
    const int64_t channels = p.modalities * p.paths * p.channels, x_pixel = (c.x_per_path ? p.paths : 1) * p.channels;
    states = p.batch * channels * p.states;
    x = normal(pixels * x_pixel, 1, p.dtype, random);
    proj = normal(pixels * p.paths * row, 1, p.dtype, random);
    if (p.rank == 0) delta = normal(pixels * p.paths * p.channels, 1, p.dtype, random);
    dy = normal(pixels * p.channels, 1, p.dtype, random);
    dt_weight = normal(channels * p.rank, 0.5 / std::sqrt(std::max<int64_t>(p.rank, 1)), DType::f32, random);
    d = normal(channels, 1, DType::f32, random);
    std::uniform_real_distribution<float> uniform(0, 1);
    for (int64_t i = 0; i < channels; ++i) {
      const double step = 0.001 * std::pow(100.0, uniform(random));
      dt_bias.push_back(static_cast<float>(step + std::log(-std::expm1(-step))));
    }
    for (int64_t i = 0; i < channels * p.decays(); ++i)
      a.push_back(static_cast<float>(-(1.0 + i % p.decays()) * (0.8 + 0.4 * uniform(random))));
    const auto strides = [&](int64_t pixel, int64_t path) {
      return Strides{p.batch * p.tokens() * pixel, p.tokens() * pixel, p.width * pixel, pixel, path};
    };
    layout.x_strides = strides(x_pixel, c.x_per_path ? p.channels : 0);
    layout.proj_strides = strides(p.paths * row, row);
    layout.delta_strides = strides(p.paths * p.channels, p.channels);
  }

 private:
  // Of many, a block of a million that is repeated in another order: drawing them would take longer than all else.
  static Values normal(int64_t count, double scale, DType dtype, std::mt19937& random) {
    constexpr int64_t kDrawn = int64_t{1} << 20;
    std::normal_distribution<float> distribution(0, static_cast<float>(scale));
    Values values(count);
    for (int64_t i = 0; i < count; ++i)
      values[i] = i < kDrawn ? rounded(distribution(random), dtype) : values[(i * 7919 + i / 4099) % kDrawn];
    return values;
  }
};

// Inputs, results and workspaces on the device.
struct OnDevice {
  const Case& c;
  Tensor x, proj, delta, dt_weight, dt_bias, a, d, dy;
  Tensor y, states, last_state, dx, dproj, ddelta, ddt_weight, ddt_bias, da, dd;
  Tensor forward_workspace, backward_workspace;
  SS2DInputs inputs;

  OnDevice(const Case& c, const Inputs& in)
      : c(c),
        x(c.problem.dtype, in.x),
        proj(c.problem.dtype, in.proj),
        delta(c.problem.dtype, in.delta),
        dt_weight(DType::f32, in.dt_weight),
        dt_bias(DType::f32, in.dt_bias),
        a(DType::f32, in.a),
        d(DType::f32, in.d),
        dy(c.problem.dtype, in.dy),
        y(c.problem.dtype, in.dy.size()),
        states(DType::f32, in.states * c.problem.pieces(cuda::checkpoint_of(c.problem.states))),
        last_state(DType::f32, in.states),
        dx(c.problem.dtype, in.x.size()),
        dproj(c.problem.dtype, in.proj.size()),
        ddelta(c.problem.dtype, in.delta.size()),
        ddt_weight(DType::f32, in.dt_weight.size()),
        ddt_bias(DType::f32, in.dt_bias.size()),
        da(DType::f32, in.a.size()),
        dd(DType::f32, in.d.size()),
        forward_workspace(DType::f32, cuda::ss2d_forward_workspace(c.problem) / 4),
        backward_workspace(DType::f32, cuda::ss2d_backward_workspace(c.problem) / 4),
        inputs(in.layout) {
    inputs.x = x.data, inputs.proj = proj.data, inputs.delta = delta.data, inputs.dt_weight = dt_weight.data;
    inputs.dt_bias = dt_bias.data, inputs.a = a.data, inputs.d = d.data;
  }
  void forward(bool save) {
    cuda::ss2d_forward(c.problem, inputs, {y.data, save ? states.data : nullptr, save ? last_state.data : nullptr},
                       forward_workspace.data, nullptr);
  }
  void backward() {
    cuda::ss2d_backward(c.problem, inputs,
                        {dy.data, states.data, c.x_per_path, dx.data, dproj.data, ddelta.data, ddt_weight.data,
                         ddt_bias.data, da.data, dd.data},
                        backward_workspace.data, nullptr);
  }
};

double relative_error(const Values& found, const Values& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

bool check_case(const Case& c, std::mt19937& random) {
  const Inputs in(c, random);
  const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  SS2DProblem exact = c.problem;
  exact.dtype = DType::f64;
  SS2DInputs inputs = in.layout;
  const auto data = [](const Values& values) { return values.empty() ? nullptr : values.data(); };
  inputs.x = data(in.x), inputs.proj = data(in.proj), inputs.delta = data(in.delta);
  inputs.dt_weight = data(in.dt_weight), inputs.dt_bias = data(in.dt_bias), inputs.a = data(in.a),
  inputs.d = data(in.d);
  Values y(in.dy.size()), states(in.states * c.problem.pieces(cpu::kCheckpoint)), last_state(in.states);
  cpu::ss2d_forward(exact, inputs, {y.data(), states.data(), last_state.data()}, threads);
  Values dx(in.x.size()), dproj(in.proj.size()), ddelta(in.delta.size()), ddt_weight(in.dt_weight.size());
  Values ddt_bias(in.dt_bias.size()), da(in.a.size()), dd(in.d.size());
  const auto room = [](Values& values) { return values.empty() ? nullptr : values.data(); };
  cpu::ss2d_backward(exact, inputs,
                     {in.dy.data(), states.data(), c.x_per_path, dx.data(), dproj.data(), room(ddelta),
                      room(ddt_weight), ddt_bias.data(), da.data(), dd.data()},
                     threads);

  OnDevice device(c, in);
  device.forward(true);
  device.backward();
  check(cudaDeviceSynchronize());
  // Of the rounded results, or of sums of tens of thousands of float32 terms.
  const double tolerance = c.problem.dtype == DType::f32 ? 2e-5 : c.problem.dtype == DType::f16 ? 4e-3 : 2e-2;
  bool good = true;
  std::string line;
  const auto compare = [&](const char* name, const Tensor& found, const Values& expected) {
    if (expected.empty()) return;
    const double error = relative_error(found.values(), expected);
    good = good && error <= tolerance;  // false for NaN
    char text[64];
    std::snprintf(text, sizeof text, " %s %.1e", name, error);
    line += text;
  };
  compare("y", device.y, y), compare("last_state", device.last_state, last_state), compare("dx", device.dx, dx);
  compare("dproj", device.dproj, dproj), compare("ddelta", device.ddelta, ddelta);
  compare("ddt_weight", device.ddt_weight, ddt_weight), compare("ddt_bias", device.ddt_bias, ddt_bias);
  compare("da", device.da, da), compare("dd", device.dd, dd);
  std::printf("%-4s %s%s\n", good ? "ok" : "FAIL", c.name.c_str(), line.c_str());
  std::fflush(stdout);
  return good;
}

void time_case(const Case& c, int repeats, std::mt19937& random) {
  const Inputs in(c, random);
  OnDevice device(c, in);
  const Tensor flush(DType::f32, size_t{64} << 20);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  const auto median = [&](auto&& call) {
    std::vector<float> times;
    for (int i = -3; i < repeats; ++i) {
      check(cudaMemsetAsync(flush.data, i, flush.count * 4));
      check(cudaEventRecord(begin));
      call();
      check(cudaEventRecord(end));
      check(cudaEventSynchronize(end));
      float milliseconds;
      check(cudaEventElapsedTime(&milliseconds, begin, end));
      if (i >= 0) times.push_back(milliseconds * 1000);  // after warming up
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  const float bare = median([&] { device.forward(false); }), forward = median([&] { device.forward(true); });
  const float backward = median([&] { device.backward(); });
  std::printf("%-48s %9.1f %9.1f %9.1f\n", c.name.c_str(), bare, forward, backward);
  std::fflush(stdout);
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
}

int run(const std::vector<std::string>& words) {
  const bool checks = words.size() > 1 && words[0] == "check", times = words.size() > 2 && words[0] == "time";
  const int repeats = times ? std::atoi(words[1].c_str()) : 1;
  if ((!checks && !times) || repeats < 1) {
    std::fprintf(stderr, "usage: ss2d_kernels check CASE... | time REPEATS CASE...\n");
    return 2;
  }
  const std::vector<Case> cases(words.begin() + (times ? 2 : 1), words.end());
  const unsigned seed = std::random_device()();
  std::mt19937 random(seed);
  std::printf("seed %u\n", seed);
  if (times) std::printf("%-48s %9s %9s %9s\n", "microseconds, median", "forward", "saving", "backward");
  int failures = 0;
  for (const Case& c : cases) {
    if (checks) {
      failures += !check_case(c, random);
    } else {
      time_case(c, repeats, random);
    }
  }
  if (checks) std::printf("%d of %zu cases failed\n", failures, cases.size());
  return failures > 0;
}

}  // namespace

int main(int argc, char** argv) try { return run({argv + 1, argv + argc}); } catch (const std::exception& error) {
  std::fprintf(stderr, "ss2d_kernels: %s\n", error.what());
  return 2;
}
