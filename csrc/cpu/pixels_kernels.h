// The kernels of pixels.h for one instruction set. Activations are converted to rows of float (double) in a buffer,
// with zeros where the image or the channels end, so that the loops have no edges and no strides.
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "pixels.h"
#include "vector_math.h"

namespace diffmf::cpu::DIFFMF_ISA {
namespace {

inline FloatV sigmoid(FloatV v) {
  const FloatV e = v < -87.f ? FloatV{} : exp_nonpositive(-absolute(v));  // not 2^-126, times a v that may be great
  const FloatV inverse = 1.f / (e + 1.f);
  return v < 0.f ? e * inverse : inverse;
}
inline DoubleV sigmoid(DoubleV v) {
  for (int i = 0; i < kWidth<double>; ++i) v[i] = 1 / (1 + std::exp(-v[i]));
  return v;
}

template <class Real>
inline Vector<Real> silu_slope(Vector<Real> v, Vector<Real> s) {
  return s * (v * (Real(1) - s) + Real(1));
}

inline int64_t padded(int64_t channels) { return (channels + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }

template <class Real, class Element>
inline void load_pixel(const Element* source, int64_t width, int64_t stride, Real* row) {
  load_row(source, width, row);
  for (int64_t i = width; i < stride; ++i) row[i] = 0;
}

// Rows [top, bottom) and columns [left, right) of an image's channels, zero outside the image.
template <class Real, class Element>
void load_window(const DepthwiseConvProblem& p, const Element* image, int64_t row_stride, int64_t column_stride,
                 int64_t top, int64_t bottom, int64_t left, int64_t right, int64_t channels, int64_t stride,
                 Real* to /* [bottom - top][right - left][stride] */) {
  for (int64_t row = top; row < bottom; ++row) {
    for (int64_t column = left; column < right; ++column, to += stride) {
      if (row >= 0 && row < p.height && column >= 0 && column < p.width) {
        load_pixel(image + row * row_stride + column * column_stride, channels, stride, to);
      } else {
        std::memset(to, 0, stride * sizeof(Real));
      }
    }
  }
}

// A tile's weights as [k * k][stride], then its bias [stride].
template <class Real>
void load_weights(const DepthwiseConvProblem& p, const DepthwiseConvInputs& inputs, const ConvTile& tile,
                  int64_t stride, Real* to) {
  const int64_t taps = int64_t{p.kernel_size} * p.kernel_size, channel = tile.m * p.channels + tile.first;
  const Real* weight = static_cast<const Real*>(inputs.weight) + channel * taps;
  std::memset(to, 0, (taps + 1) * stride * sizeof(Real));
  for (int64_t c = 0; c < tile.last - tile.first; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) to[tap * stride + c] = weight[c * taps + tap];
    if (inputs.bias) to[taps * stride + c] = static_cast<const Real*>(inputs.bias)[channel + c];
  }
}

// A row of `columns` pixels of the convolution for one vector of channels; finish(sum) goes to `to`, `stride` apart.
// `window` is at the first pixel's first tap; its rows are `line` apart, its pixels and the weights `stride`.
template <int K, bool kFlipped, class Real, class Finish>
inline void convolve_row(const Real* window, int64_t line, int64_t stride, const Real* weights, Vector<Real> bias,
                         int64_t columns, Real* to, Finish finish) {
  Vector<Real> w[K * K];
  for (int tap = 0; tap < K * K; ++tap) w[tap] = load(weights + (kFlipped ? K * K - 1 - tap : tap) * stride);
  for (int64_t column = 0; column < columns; ++column, window += stride, to += stride) {
    Vector<Real> sum = bias;
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j) sum += w[i * K + j] * load(window + i * line + j * stride);
    }
    finish(sum, to);
  }
}

template <class Function>
inline void with_kernel_size(int kernel_size, Function f) {
  switch (kernel_size) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, 7>());
  }
}

int64_t conv_scratch(const DepthwiseConvProblem& p, bool backward) {
  const int64_t pad = p.kernel_size / 2, taps = int64_t{p.kernel_size} * p.kernel_size;
  const auto window = [](int64_t margin) { return (kTileRows + 2 * margin) * (kTileColumns + 2 * margin); };
  int64_t rows = window(backward ? 2 * pad : pad) + taps + 1 + kTileColumns;
  if (backward) rows += window(pad) + taps + 1;
  return rows * kTileChannels * (p.dtype == DType::f64 ? 8 : 4);
}

template <class Real, class Element>
const Element* conv_image(const DepthwiseConvInputs& inputs, const ConvTile& tile) {
  return static_cast<const Element*>(inputs.x) + tile.m * inputs.x_strides.modality + tile.b * inputs.x_strides.batch +
         tile.first;
}

template <int K, class Real, class Element>
void conv_forward_tile(const DepthwiseConvProblem& p, const DepthwiseConvInputs& inputs, Element* y,
                       const ConvTile& tile, Real* scratch) {
  constexpr int64_t kPad = K / 2;
  const int64_t channels = tile.last - tile.first, stride = padded(channels);
  const int64_t columns = tile.right - tile.left, line = (columns + 2 * kPad) * stride;
  Real *weights = scratch, *result = weights + (K * K + 1) * stride, *window = result + columns * stride;
  load_weights(p, inputs, tile, stride, weights);
  load_window(p, conv_image<Real, Element>(inputs, tile), inputs.x_strides.row, inputs.x_strides.column,
              tile.top - kPad, tile.bottom + kPad, tile.left - kPad, tile.right + kPad, channels, stride, window);
  Element* image = y + (tile.m * p.batch + tile.b) * p.height * p.width * p.channels + tile.first;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      convolve_row<K, false>(window + (row - tile.top) * line + c, line, stride, weights + c,
                             load(weights + K * K * stride + c), columns, result + c,
                             [](Vector<Real> pre, Real* to) { store(to, pre * sigmoid(pre)); });
    }
    Element* pixel = image + (row * p.width + tile.left) * p.channels;
    for (int64_t i = 0; i < columns; ++i) store_row(result + i * stride, channels, pixel + i * p.channels);
  }
}

template <int K, class Real, class Element>
void conv_backward_tile(const DepthwiseConvProblem& p, const DepthwiseConvInputs& inputs,
                        const DepthwiseConvGradients& gradients, const ConvTile& tile, Real* scratch) {
  constexpr int64_t kPad = K / 2;
  const int64_t channels = tile.last - tile.first, stride = padded(channels);
  const int64_t rows = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t line = (columns + 4 * kPad) * stride, g_line = (columns + 2 * kPad) * stride;
  Real *weights = scratch, *result = weights + (K * K + 1) * stride, *sums = result + columns * stride;
  Real *g = sums + (K * K + 1) * stride, *window = g + (rows + 2 * kPad) * g_line;
  load_weights(p, inputs, tile, stride, weights);
  load_window(p, conv_image<Real, Element>(inputs, tile), inputs.x_strides.row, inputs.x_strides.column,
              tile.top - 2 * kPad, tile.bottom + 2 * kPad, tile.left - 2 * kPad, tile.right + 2 * kPad, channels,
              stride, window);
  const int64_t corner = (tile.m * p.batch + tile.b) * p.height * p.width * p.channels + tile.first;
  load_window(p, static_cast<const Element*>(gradients.dy) + corner, p.width * p.channels, p.channels, tile.top - kPad,
              tile.bottom + kPad, tile.left - kPad, tile.right + kPad, channels, stride, g);
  // g = dy * silu'(pre), with a margin; outside the image dy is zero and g stays so.
  for (int64_t row = 0; row < rows + 2 * kPad; ++row) {
    const int64_t image_row = tile.top - kPad + row;
    if (image_row < 0 || image_row >= p.height) continue;
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      convolve_row<K, false>(window + row * line + c, line, stride, weights + c, load(weights + K * K * stride + c),
                             columns + 2 * kPad, g + row * g_line + c, [](Vector<Real> pre, Real* at) {
                               store(at, load(at) * silu_slope<Real>(pre, sigmoid(pre)));
                             });
    }
  }
  Element* dx = static_cast<Element*>(gradients.dx) + corner;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      convolve_row<K, true>(g + row * g_line + c, g_line, stride, weights + c, Vector<Real>{}, columns, result + c,
                            [](Vector<Real> sum, Real* to) { store(to, sum); });
    }
    Element* pixel = dx + ((tile.top + row) * p.width + tile.left) * p.channels;
    for (int64_t i = 0; i < columns; ++i) store_row(result + i * stride, channels, pixel + i * p.channels);
  }
  for (int64_t c = 0; c < stride; c += kWidth<Real>) {
    for (int i = 0; i < K; ++i) {  // one row of taps at a time, in registers
      Vector<Real> tap[K] = {}, bias = {};
      for (int64_t row = 0; row < rows; ++row) {
        const Real* x = window + (row + kPad + i) * line + kPad * stride + c;
        const Real* slope = g + (row + kPad) * g_line + kPad * stride + c;
        for (int64_t column = 0; column < columns; ++column, x += stride, slope += stride) {
          const Vector<Real> upstream = load(slope);
          for (int j = 0; j < K; ++j) tap[j] += upstream * load(x + j * stride);
          bias += upstream;
        }
      }
      for (int j = 0; j < K; ++j) store(sums + (i * K + j) * stride + c, tap[j]);
      if (i == 0) store(sums + K * K * stride + c, bias);
    }
  }
  const int64_t channel = (tile.part * p.modalities + tile.m) * p.channels + tile.first;
  for (int64_t c = 0; c < channels; ++c) {
    for (int tap = 0; tap < K * K; ++tap) {
      static_cast<Real*>(gradients.dweight)[(channel + c) * (K * K) + tap] = sums[tap * stride + c];
    }
    if (gradients.dbias) static_cast<Real*>(gradients.dbias)[channel + c] = sums[K * K * stride + c];
  }
}

// Calls f(Real(), Element*) for the types of dtype.
template <class Function>
inline void with_types(DType dtype, Function f) {
  if (dtype == DType::f64) return f(double(), static_cast<double*>(nullptr));
  with_element(dtype, float(), [&](auto* element) { f(float(), element); });
}

void conv_forward(const DepthwiseConvProblem& p, const DepthwiseConvInputs& inputs, void* y, const ConvTile& tile,
                  void* scratch) {
  with_types(p.dtype, [&](auto real, auto* element) {
    with_kernel_size(p.kernel_size, [&](auto k) {
      conv_forward_tile<k()>(p, inputs, static_cast<decltype(element)>(y), tile, static_cast<decltype(real)*>(scratch));
    });
  });
}

void conv_backward(const DepthwiseConvProblem& p, const DepthwiseConvInputs& inputs,
                   const DepthwiseConvGradients& gradients, const ConvTile& tile, void* scratch) {
  with_types(p.dtype, [&](auto real, auto* element) {
    with_kernel_size(p.kernel_size, [&](auto k) {
      conv_backward_tile<k(), decltype(real), std::remove_pointer_t<decltype(element)>>(
          p, inputs, gradients, tile, static_cast<decltype(real)*>(scratch));
    });
  });
}

template <class Real>
inline Real sum_of(Vector<Real> v) {
  Real sum = 0;
  for (int i = 0; i < kWidth<Real>; ++i) sum += v[i];
  return sum;
}

int64_t norm_scratch(const NormGateProblem& p) { return 7 * padded(p.channels) * (p.dtype == DType::f64 ? 8 : 4); }

// Turns a row (zero beyond its channels) into its distance from its mean; returns 1 / standard deviation.
template <class Real>
inline Real center(const NormGateProblem& p, Real* row) {
  const int64_t stride = padded(p.channels);
  Vector<Real> sum = {}, squares = {};
  for (int64_t c = 0; c < stride; c += kWidth<Real>) sum += load(row + c);
  const Real mean = sum_of<Real>(sum) / p.channels;
  for (int64_t c = 0; c < stride; c += kWidth<Real>) store(row + c, load(row + c) - mean);
  for (int64_t c = p.channels; c < stride; ++c) row[c] = 0;
  for (int64_t c = 0; c < stride; c += kWidth<Real>) squares += load(row + c) * load(row + c);
  return 1 / std::sqrt(sum_of<Real>(squares) / p.channels + static_cast<Real>(p.eps));
}

template <class Real, class Element>
void norm_forward_rows(const NormGateProblem& p, const NormGateInputs& inputs, Element* out, int64_t m, int64_t first,
                       int64_t last, Real* scratch) {
  const int64_t stride = padded(p.channels);
  Real *weight = scratch, *bias = weight + stride, *row = bias + stride, *gate = row + stride;
  load_pixel(static_cast<const Real*>(inputs.weight) + m * p.channels, p.channels, stride, weight);
  load_pixel(static_cast<const Real*>(inputs.bias) + m * p.channels, p.channels, stride, bias);
  const Element* y = static_cast<const Element*>(inputs.y) + m * inputs.y_strides.modality;
  const Element* z = static_cast<const Element*>(inputs.z) + m * inputs.z_strides.modality;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    load_pixel(y + pixel * inputs.y_strides.pixel, p.channels, stride, row);
    if (inputs.z) load_pixel(z + pixel * inputs.z_strides.pixel, p.channels, stride, gate);
    const Real rstd = center(p, row);
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      Vector<Real> value = load(row + c) * rstd * load(weight + c) + load(bias + c);
      if (inputs.z) value *= load(gate + c) * sigmoid(load(gate + c));
      store(row + c, value);
    }
    store_row(row, p.channels, out + (m * p.pixels + pixel) * p.channels);
  }
}

template <class Real, class Element>
void norm_backward_rows(const NormGateProblem& p, const NormGateInputs& inputs, const NormGateGradients& gradients,
                        int64_t m, int64_t first, int64_t last, int64_t part, Real* scratch) {
  const int64_t stride = padded(p.channels);
  Real *weight = scratch, *bias = weight + stride, *row = bias + stride, *gate = row + stride;
  Real *dweight = gate + stride, *dbias = dweight + stride, *upstream = dbias + stride;
  load_pixel(static_cast<const Real*>(inputs.weight) + m * p.channels, p.channels, stride, weight);
  load_pixel(static_cast<const Real*>(inputs.bias) + m * p.channels, p.channels, stride, bias);
  std::memset(dweight, 0, 2 * stride * sizeof(Real));
  const Element* y = static_cast<const Element*>(inputs.y) + m * inputs.y_strides.modality;
  const Element* z = static_cast<const Element*>(inputs.z) + m * inputs.z_strides.modality;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    const int64_t at = (m * p.pixels + pixel) * p.channels;
    load_pixel(y + pixel * inputs.y_strides.pixel, p.channels, stride, row);
    load_pixel(static_cast<const Element*>(gradients.dout) + at, p.channels, stride, upstream);
    if (inputs.z) load_pixel(z + pixel * inputs.z_strides.pixel, p.channels, stride, gate);
    const Real rstd = center(p, row);
    Vector<Real> sum = {}, projection = {};
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      const Vector<Real> n = load(row + c) * rstd;
      Vector<Real> d = load(upstream + c);
      if (inputs.z) {
        const Vector<Real> v = load(gate + c), s = sigmoid(v);
        store(gate + c, d * (n * load(weight + c) + load(bias + c)) * silu_slope<Real>(v, s));
        d *= v * s;
      }
      store(dweight + c, load(dweight + c) + d * n);
      store(dbias + c, load(dbias + c) + d);
      d *= load(weight + c);
      sum += d;
      projection += d * n;
      store(row + c, n);
      store(upstream + c, d);
    }
    const Real mean = sum_of<Real>(sum) / p.channels, slope = sum_of<Real>(projection) / p.channels;
    for (int64_t c = 0; c < stride; c += kWidth<Real>) {
      store(row + c, rstd * (load(upstream + c) - mean - load(row + c) * slope));
    }
    store_row(row, p.channels, static_cast<Element*>(gradients.dy) + at);
    if (inputs.z) store_row(gate, p.channels, static_cast<Element*>(gradients.dz) + at);
  }
  const int64_t channel = (part * p.modalities + m) * p.channels;
  std::memcpy(static_cast<Real*>(gradients.dweight) + channel, dweight, p.channels * sizeof(Real));
  std::memcpy(static_cast<Real*>(gradients.dbias) + channel, dbias, p.channels * sizeof(Real));
}

void norm_forward(const NormGateProblem& p, const NormGateInputs& inputs, void* out, int64_t m, int64_t first,
                  int64_t last, void* scratch) {
  with_types(p.dtype, [&](auto real, auto* element) {
    norm_forward_rows(p, inputs, static_cast<decltype(element)>(out), m, first, last,
                      static_cast<decltype(real)*>(scratch));
  });
}

void norm_backward(const NormGateProblem& p, const NormGateInputs& inputs, const NormGateGradients& gradients,
                   int64_t m, int64_t first, int64_t last, int64_t part, void* scratch) {
  with_types(p.dtype, [&](auto real, auto* element) {
    norm_backward_rows<decltype(real), std::remove_pointer_t<decltype(element)>>(
        p, inputs, gradients, m, first, last, part, static_cast<decltype(real)*>(scratch));
  });
}

}  // namespace

const PixelKernels pixel_kernels = {conv_scratch, conv_forward, conv_backward,
                                    norm_scratch, norm_forward, norm_backward};

}  // namespace diffmf::cpu::DIFFMF_ISA
