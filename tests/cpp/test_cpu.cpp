// The CPU kernels against a naive loop in double, their gradients against finite differences and against each other.
// Prints what it measured; exit code 1 if anything is out of its tolerance. Fresh random data each run: the seed is
// printed, and taken as the first argument.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "diffmf/cross_scan.h"
#include "diffmf/ss2d.h"

using namespace diffmf;
using cpu::kCheckpoint;

namespace {

std::mt19937_64 generator;
int failures = 0;

void check(const std::string& what, double measured, double tolerance) {
  const bool good = measured <= tolerance;  // false for NaN
  failures += !good;
  std::printf("%-4s %-62s %.2e (at most %.0e)\n", good ? "ok" : "FAIL", what.c_str(), measured, tolerance);
}

using Values = std::vector<double>;

Values random_values(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> distribution(low, high);
  Values values(count);
  for (double& value : values) value = distribution(generator);
  return values;
}

double relative_error(const Values& found, const Values& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// A tensor of one of the dtypes, by its bytes.
struct Tensor {
  DType dtype;
  std::vector<unsigned char> bytes;

  static int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

  // Uninitialized results: NaN in every dtype.
  Tensor(DType type, int64_t count) : dtype(type), bytes(count * size_of(type), 0xff) {}
  Tensor(DType type, const Values& values) : Tensor(type, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float value = static_cast<float>(values[i]);
      if (dtype == DType::f64) {
        std::memcpy(&bytes[i * 8], &values[i], 8);
      } else if (dtype == DType::f32) {
        std::memcpy(&bytes[i * 4], &value, 4);
      } else {  // bf16 by truncation: any bf16 value will do
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(&bytes[i * 2], &high, 2);
      }
    }
  }

  void* data() { return bytes.empty() ? nullptr : bytes.data(); }
  Values values() const {
    Values result(bytes.size() / size_of(dtype));
    for (size_t i = 0; i < result.size(); ++i) {
      float value = 0;
      if (dtype == DType::f64) {
        std::memcpy(&result[i], &bytes[i * 8], 8);
        continue;
      }
      if (dtype == DType::f32) {
        std::memcpy(&value, &bytes[i * 4], 4);
      } else {
        uint16_t high;
        std::memcpy(&high, &bytes[i * 2], 2);
        const uint32_t bits = static_cast<uint32_t>(high) << 16;
        std::memcpy(&value, &bits, 4);
      }
      result[i] = value;
    }
    return result;
  }
};

// The tensors in double, contiguous, in the order of their gradients; empty where absent.
enum { kX, kProj, kDelta, kDtWeight, kDtBias, kA, kD, kTensors };
const char* const kNames[] = {"x", "proj", "delta", "dt_weight", "dt_bias", "A", "D"};

struct Case {
  const char* name;
  SS2DProblem problem;
  bool x_per_path, bias, skip;
  Values tensors[kTensors];
  Values dy;
};

int64_t pixels(const SS2DProblem& p) { return p.modalities * p.batch * p.height * p.width; }
int64_t proj_width(const SS2DProblem& p) { return p.rank + 2 * p.states; }
DType parameter_type(const SS2DProblem& p) { return p.dtype == DType::f64 ? DType::f64 : DType::f32; }

void fill(Case& c) {
  const SS2DProblem& p = c.problem;
  const int64_t rows = p.modalities * p.paths * p.channels;
  c.tensors[kX] = random_values(pixels(p) * (c.x_per_path ? p.paths : 1) * p.channels, -1, 1);
  c.tensors[kProj] = random_values(pixels(p) * p.paths * proj_width(p), -1, 1);
  c.tensors[kDelta] = random_values(p.rank ? 0 : pixels(p) * p.paths * p.channels, p.softplus ? -1 : 0.01, 1);
  c.tensors[kDtWeight] = random_values(rows * p.rank, -0.5, 0.5);
  c.tensors[kDtBias] = random_values(c.bias ? rows : 0, p.softplus ? -3 : 0, p.softplus ? 0 : 0.2);
  // Weak decays where they are computed differently, by zoh: elsewhere a long memory's sums cancel now and then, and
  // leave little but rounding.
  c.tensors[kA] = random_values(rows * p.decays(), -2, p.discretization == Discretization::zoh ? -1e-4 : -0.1);
  c.tensors[kD] = random_values(c.skip ? rows : 0, -1, 1);
  c.dy = random_values(pixels(p) * p.channels, -1, 1);
}

// The tensors as the dtypes hold them, so that rounding them is no part of the errors.
void round_to_dtype(Case& c) {
  for (int i = 0; i < kTensors; ++i) {
    const DType dtype = i <= kDelta ? c.problem.dtype : parameter_type(c.problem);
    c.tensors[i] = Tensor(dtype, c.tensors[i]).values();
  }
  c.dy = Tensor(c.problem.dtype, c.dy).values();
}

int64_t pixel_of(const SS2DProblem& p, int path, int64_t l) {
  if (path >= 2) l = p.tokens() - 1 - l;
  return path % 2 == 0 ? l : l % p.height * p.width + l / p.height;
}

struct Naive {
  Values y, states, last_state;
};

// The definition in ss2d.h, one channel and token after the other.
Naive naive_forward(const Case& c) {
  const SS2DProblem& p = c.problem;
  const int64_t M = p.modalities, B = p.batch, K = p.paths, D = p.channels, N = p.states, R = p.rank, L = p.tokens();
  const int64_t width = proj_width(p), decays = p.decays(), pieces = p.pieces(kCheckpoint);
  Naive result;
  result.y.assign(M * B * L * D, 0);
  result.states.assign(M * B * K * pieces * N * D, 0);
  result.last_state.assign(M * B * K * N * D, 0);
  for (int64_t sequence = 0; sequence < M * B * K * D; ++sequence) {
    const int64_t d = sequence % D, k = sequence / D % K, b = sequence / D / K % B, m = sequence / D / K / B;
    const int64_t row = (m * K + k) * D + d;
    Values h(N, 0);
    for (int64_t l = 0; l < L; ++l) {
      const int64_t pixel = pixel_of(p, p.path[k], l), q = p.path[k] >= 2 ? L - 1 - l : l;
      const int64_t at = (m * B + b) * L + pixel, source_at = (p.source(m) * B + b) * L + pixel;
      const bool enters = p.path[k] >= 2 ? l == 0 || q % kCheckpoint == kCheckpoint - 1 : q % kCheckpoint == 0;
      for (int64_t n = 0; enters && n < N; ++n) {
        result.states[((((m * B + b) * K + k) * pieces + q / kCheckpoint) * N + n) * D + d] = h[n];
      }
      const double x = c.tensors[kX][c.x_per_path ? (at * K + k) * D + d : at * D + d];
      double raw = R ? 0 : c.tensors[kDelta][(at * K + k) * D + d];
      for (int64_t r = 0; r < R; ++r) {
        raw += c.tensors[kProj][(at * K + k) * width + r] * c.tensors[kDtWeight][row * R + r];
      }
      if (c.bias) raw += c.tensors[kDtBias][row];
      const double step = p.softplus ? (raw > 20 ? raw : std::log1p(std::exp(raw))) : raw;
      double y = c.skip ? c.tensors[kD][row] * x : 0;
      for (int64_t n = 0; n < N; ++n) {
        const double a = c.tensors[kA][row * decays + (p.shared_decay ? 0 : n)];
        const double* bc = &c.tensors[kProj][(source_at * K + k) * width + R];
        const double bbar = p.discretization == Discretization::zoh ? std::expm1(step * a) / a : step;
        h[n] = std::exp(step * a) * h[n] + bbar * bc[n] * x;
        y += bc[N + n] * h[n];
      }
      result.y[at * D + d] += y;
    }
    for (int64_t n = 0; n < N; ++n) result.last_state[(((m * B + b) * K + k) * N + n) * D + d] = h[n];
  }
  return result;
}

// The case's tensors in the problem's dtypes, with x and proj inside wider rows to exercise strides.
struct Inputs {
  std::vector<Tensor> tensors;
  SS2DInputs arguments;

  explicit Inputs(const Case& c) : arguments{} {
    const SS2DProblem& p = c.problem;
    const int64_t pad = 3, path_x = c.x_per_path ? p.paths : 1;
    for (int i = 0; i < kTensors; ++i) {
      const DType dtype = i <= kDelta ? p.dtype : parameter_type(p);
      if (i == kX || i == kProj) {
        const int64_t width = i == kX ? p.channels : proj_width(p);
        Values padded(c.tensors[i].size() / width * (width + pad), NAN);
        for (size_t j = 0; j < c.tensors[i].size(); ++j)
          padded[j / width * (width + pad) + j % width] = c.tensors[i][j];
        tensors.emplace_back(dtype, padded);
      } else {
        tensors.emplace_back(dtype, c.tensors[i]);
      }
    }
    const auto strides = [&](int64_t width, int64_t paths) {
      const int64_t pixel = width * paths, image = p.tokens() * pixel;
      return Strides{p.batch * image, image, p.width * pixel, pixel,
                     paths > 1 || width != p.channels + pad ? width : 0};
    };
    arguments.x = tensors[kX].data();
    arguments.x_strides = strides(p.channels + pad, path_x);
    if (!c.x_per_path) arguments.x_strides.path = 0;
    arguments.proj = tensors[kProj].data();
    arguments.proj_strides = strides(proj_width(p) + pad, p.paths);
    arguments.delta = tensors[kDelta].data();
    arguments.delta_strides = strides(p.channels, p.paths);
    arguments.dt_weight = tensors[kDtWeight].data();
    arguments.dt_bias = tensors[kDtBias].data();
    arguments.a = tensors[kA].data();
    arguments.d = tensors[kD].data();
  }
};

struct Forward {
  Tensor y, states, last_state;

  Forward(const Case& c, int threads)
      : y(c.problem.dtype, pixels(c.problem) * c.problem.channels),
        states(parameter_type(c.problem), c.problem.modalities * c.problem.batch * c.problem.paths *
                                              c.problem.pieces(kCheckpoint) * c.problem.states * c.problem.channels),
        last_state(parameter_type(c.problem),
                   c.problem.modalities * c.problem.batch * c.problem.paths * c.problem.states * c.problem.channels) {
    Inputs inputs(c);
    cpu::ss2d_forward(c.problem, inputs.arguments, {y.data(), states.data(), last_state.data()}, threads);
  }
};

// The gradients by tensor.
struct Backward {
  std::vector<Tensor> raw;
  Values gradients[kTensors];

  Backward(const Case& c, Forward& forward, int threads) {
    const SS2DProblem& p = c.problem;
    for (int i = 0; i < kTensors; ++i)
      raw.emplace_back(i <= kDelta ? p.dtype : parameter_type(p), static_cast<int64_t>(c.tensors[i].size()));
    Inputs inputs(c);
    Tensor dy(p.dtype, c.dy);
    SS2DGradients arguments{dy.data(),         forward.states.data(), c.x_per_path,          raw[kX].data(),
                            raw[kProj].data(), raw[kDelta].data(),    raw[kDtWeight].data(), raw[kDtBias].data(),
                            raw[kA].data(),    raw[kD].data()};
    cpu::ss2d_backward(p, inputs.arguments, arguments, threads);
    for (int i = 0; i < kTensors; ++i) gradients[i] = raw[i].values();
  }
};

double loss(const Case& c) {
  const Naive result = naive_forward(c);
  double sum = 0;
  for (size_t i = 0; i < result.y.size(); ++i) sum += result.y[i] * c.dy[i];
  return sum;
}

void test_ss2d(Case c) {
  c.problem.dtype = DType::f64;
  fill(c);
  const std::string name = c.name;

  // f64. Measured over hundreds of cases: forward 2e-15; central differences 1e-8, their own error.
  const Naive expected = naive_forward(c);
  Forward forward(c, 2);
  check(name + " y f64", relative_error(forward.y.values(), expected.y), 1e-13);
  check(name + " states f64", relative_error(forward.states.values(), expected.states), 1e-13);
  check(name + " last_state f64", relative_error(forward.last_state.values(), expected.last_state), 1e-13);
  const Backward exact(c, forward, 2);
  for (int i = 0; i < kTensors; ++i) {
    if (c.tensors[i].empty()) continue;
    const Values direction = random_values(static_cast<int64_t>(c.tensors[i].size()), -1, 1);
    double slope = 0, scale = 0, ends[2];
    for (size_t j = 0; j < direction.size(); ++j) {
      slope += direction[j] * exact.gradients[i][j];
      scale += std::fabs(direction[j] * exact.gradients[i][j]);
    }
    for (int sign = 0; sign < 2; ++sign) {
      Case moved = c;
      for (size_t j = 0; j < direction.size(); ++j) moved.tensors[i][j] += (sign ? 1e-5 : -1e-5) * direction[j];
      ends[sign] = loss(moved);
    }
    check(name + " d" + kNames[i] + " against differences", std::fabs((ends[1] - ends[0]) / 2e-5 - slope) / scale,
          1e-6);
  }

  // The narrower dtypes against f64 on the same (rounded) values. Measured: f32 5e-7 forward, 1.1e-6 on gradients;
  // bf16 3e-3, the rounding of its results.
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::string type = dtype == DType::f32 ? " f32" : " bf16";
    const double forward_tolerance = dtype == DType::f32 ? 2e-6 : 6e-3, tolerance = dtype == DType::f32 ? 5e-6 : 6e-3;
    c.problem.dtype = dtype;
    round_to_dtype(c);
    Case reference = c;
    reference.problem.dtype = DType::f64;
    Forward reference_forward(reference, 1), narrow(c, 1), threaded(c, 5);
    check(name + " y" + type, relative_error(narrow.y.values(), naive_forward(reference).y), forward_tolerance);
    check(name + " y on five threads" + type, narrow.y.bytes != threaded.y.bytes, 0);
    const Backward wide(reference, reference_forward, 1), gradients(c, narrow, 1), again(c, narrow, 5);
    for (int i = 0; i < kTensors; ++i) {
      if (c.tensors[i].empty()) continue;
      check(name + " d" + kNames[i] + type, relative_error(gradients.gradients[i], wide.gradients[i]), tolerance);
      check(name + " d" + kNames[i] + " on five threads" + type, gradients.raw[i].bytes != again.raw[i].bytes, 0);
    }
  }
}

// NaN and infinity in one batch item leave the others as they were, and do not get lost.
void test_containment(Case c) {
  c.problem.dtype = DType::f32;
  fill(c);
  const Values clean = Forward(c, 2).y.values();
  const int64_t image = c.problem.tokens() * c.problem.channels;
  for (const double bad : Values{NAN, INFINITY}) {
    Case poisoned = c;
    poisoned.tensors[kX][0] = bad;  // batch item 0, its first pixel
    const Values y = Forward(poisoned, 2).y.values();
    int64_t touched = 0, finite = 0;
    for (int64_t i = image; i < 2 * image; ++i) touched += y[i] != clean[i];
    for (int64_t pixel = 0; pixel < c.problem.tokens(); ++pixel) {
      finite += std::isfinite(y[pixel * c.problem.channels]);
    }
    check(std::string("values touched in the other item by ") + (std::isnan(bad) ? "NaN" : "Inf"), touched, 0);
    check(std::string("finite outputs of the channel scanned after ") + (std::isnan(bad) ? "NaN" : "Inf"), finite, 0);
  }
}

// exp and softplus over their whole range, through a problem of one token: y = softplus(raw) with B = C = x = 1, and
// two tokens: y = exp(A) where only the first token has input.
void test_functions() {
  SS2DProblem p{};
  p.dtype = DType::f32;
  p.modalities = p.height = p.width = p.states = p.paths = 1;
  p.batch = 20000;
  p.channels = 1;
  p.softplus = true;
  Case c{"softplus", p, false, false, false, {}, {}};
  c.tensors[kX].assign(p.batch, 1);
  c.tensors[kProj].assign(p.batch * 2, 1);
  c.tensors[kDelta] = random_values(p.batch, -85, 40);
  c.tensors[kA] = {-1};
  round_to_dtype(c);
  const Values step = Forward(c, 2).y.values();
  double worst = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const double raw = c.tensors[kDelta][i], exact = raw > 20 ? raw : std::log1p(std::exp(raw));
    worst = std::fmax(worst, std::fabs(step[i] / exact - 1));
  }
  check("softplus, relative error from -85 to 40", worst, 5e-7);  // measured 3e-7

  p.width = 2;
  p.softplus = false;
  Case e{"exp", p, false, false, false, {}, {}};
  e.tensors[kProj].assign(p.batch * 4, 1);
  e.tensors[kA] = {-1};
  for (int64_t i = 0; i < p.batch; ++i) {
    e.tensors[kX].insert(e.tensors[kX].end(), {1, 0});
    e.tensors[kDelta].insert(e.tensors[kDelta].end(), {1, random_values(1, -85, 85)[0]});
  }
  round_to_dtype(e);
  const Values y = Forward(e, 2).y.values();
  worst = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    // The argument is rounded to float in units of log(2): |z| 2^-24 of relative error belong to that.
    const double z = -e.tensors[kDelta][2 * i + 1];
    worst = std::fmax(worst, std::fabs(y[2 * i + 1] / std::exp(z) - 1) - std::fabs(z) * 1.2e-7);
  }
  check("exp, relative error from -85 to 85 beyond that of its argument", worst, 2.4e-7);  // 2 ulp; measured 9e-8

  for (const double z : Values{-INFINITY, -1e30, -200, 100, NAN}) {
    Case limit{"limit", p, false, false, false, {}, {}};
    limit.problem.batch = 1;
    limit.tensors[kX] = {1, 0};
    limit.tensors[kProj].assign(4, 1);
    limit.tensors[kDelta] = {1, -z};
    limit.tensors[kA] = {-1};
    const float found = static_cast<float>(Forward(limit, 1).y.values()[1]);
    const float exact = static_cast<float>(std::exp(z));
    // With delta infinite the input's term is infinity times zero.
    const bool same = std::isnan(exact) || std::isinf(z) ? std::isnan(found) : found == exact;
    check("exp(" + std::to_string(z) + ")", !same, 0);
  }
}

void test_cross_scan(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const CrossScanProblem p{batch, channels, height, width, 5, {0, 1, 2, 3, 1}};
  const SS2DProblem order{DType::f64, 1, batch, height, width, channels, 1, 0, 5, {0, 1, 2, 3, 1}, {}, {}, {}, {}};
  const int64_t L = height * width;
  const std::string name = "cross_scan " + std::to_string(height) + "x" + std::to_string(width);
  const Values image = random_values(batch * channels * L, -1, 1), y = random_values(batch * 5 * channels * L, -1, 1);
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    Tensor source(dtype, image), scanned(dtype, static_cast<int64_t>(y.size()));
    cpu::cross_scan(p, Tensor::size_of(dtype), source.data(), scanned.data(), 3);
    Tensor sequences(dtype, y), merged(dtype, static_cast<int64_t>(image.size()));
    cpu::cross_merge(p, dtype, sequences.data(), merged.data(), 3);
    const Values rounded = source.values(), found = scanned.values(), addends = sequences.values();
    Values sums(image.size(), 0);
    int64_t wrong = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
      const int64_t l = i % L, c = i / L % channels, k = i / L / channels % 5, b = i / L / channels / 5;
      const int64_t pixel = (b * channels + c) * L + pixel_of(order, p.path[k], l);
      wrong += found[i] != rounded[pixel];
      sums[pixel] += addends[i];
    }
    check(name + ", wrong elements", wrong, 0);
    // One rounding of the result; measured 0, 1e-7 and 2e-3.
    check(name + ", merge", relative_error(merged.values(), sums),
          dtype == DType::f64   ? 1e-15
          : dtype == DType::f32 ? 3e-7
                                : 4e-3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  generator.seed(seed);
  const auto euler = Discretization::euler, zoh = Discretization::zoh;
  // The smallest images come many at a time, lest all of their few results cancel by chance.
  // dtype (set by the test), M, B, H, W, D, N, R, K, paths, exchange, discretization, shared decay, softplus
  const Case four{"one modality",
                  {{}, 1, 2, 7, 11, 18, 16, 2, 4, {0, 1, 2, 3}, Exchange::none, euler, false, true},
                  false,
                  true,
                  true,
                  {},
                  {}};
  test_ss2d(four);
  test_ss2d({"mutual zoh",
             {{}, 2, 1, 5, 27, 16, 5, 1, 4, {0, 1, 2, 3}, Exchange::mutual, zoh, false, true},
             true,
             true,
             true,
             {},
             {}});
  test_ss2d({"from_visible",
             {{}, 2, 2, 9, 8, 5, 17, 3, 4, {0, 0, 2, 1}, Exchange::from_visible, euler, true, true},
             false,
             false,
             true,
             {},
             {}});
  test_ss2d({"from_infrared",
             {{}, 2, 1, 13, 6, 33, 1, 17, 2, {3, 1}, Exchange::from_infrared, zoh, true, true},
             false,
             true,
             false,
             {},
             {}});
  test_ss2d({"delta, softplus",
             {{}, 3, 1, 1, 70, 5, 4, 0, 1, {0}, Exchange::none, euler, false, true},
             false,
             true,
             true,
             {},
             {}});
  test_ss2d({"delta as it is",
             {{}, 1, 19, 1, 1, 2, 3, 0, 1, {2}, Exchange::none, zoh, false, false},
             true,
             false,
             false,
             {},
             {}});
  test_ss2d({"several segments",
             {{}, 1, 1, 37, 31, 5, 3, 1, 4, {0, 1, 2, 3}, Exchange::none, euler, false, true},
             false,
             true,
             true,
             {},
             {}});
  test_containment(four);
  test_functions();
  test_cross_scan(19, 3, 1, 1);
  test_cross_scan(1, 2, 37, 70);
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}
