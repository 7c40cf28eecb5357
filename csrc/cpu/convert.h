// Rows of tokens in any dtype to and from the tiles of float or double that the kernels work on.
#pragma once

#include <cstring>

#include "scan.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace diffmf::cpu::DIFFMF_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  // Subnormals count 2^-24; a float that is subnormal itself would be zero where the caller has denormals off.
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t exponent = magnitude < 0x7c00 ? 112 : 224;  // added to half's; all ones stay all ones
  return float_of(sign | (magnitude < 0x400 ? small : (magnitude << 13) + (exponent << 23)));
}

// Round to nearest even; NaN stays NaN.
inline void narrow(float value, float& result) { result = value; }
inline void narrow(double value, double& result) { result = value; }
inline void narrow(float value, BFloat16& result) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>(value != value ? bits >> 16 | 0x40 : rounded);
}
inline void narrow(float value, Half& result) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, halfway from the largest half to the next power of two
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: the addition rounds to a multiple of 2^-24, the smallest subnormal
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  result.bits = static_cast<uint16_t>(sign | half);
}

template <class Element, class Real>
inline void load_row(const Element* __restrict source, int64_t width, Real* __restrict row) {
  for (int64_t i = 0; i < width; ++i) row[i] = widen(source[i]);
}

template <class Element, class Real>
inline void store_row(const Real* __restrict row, int64_t width, Element* __restrict target) {
  for (int64_t i = 0; i < width; ++i) narrow(row[i], target[i]);
}

#if defined(__F16C__)
inline void load_row(const Half* source, int64_t width, float* row) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < width; ++i) row[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(source[i].bits)));
}

inline void store_row(const float* row, int64_t width, Half* target) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < width; ++i) {
    target[i].bits =
        static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(row[i]), _MM_FROUND_TO_NEAREST_INT)));
  }
}
#endif

// f(i, row) for the rows of the tokens first + i < last of the axis.
template <class Element, class Function>
inline void for_rows(const Rows& rows, int64_t first, int64_t last, Function f) {
  Element* base = static_cast<Element*>(rows.base);
  int64_t line = first / rows.line, position = first % rows.line;
  for (int64_t i = 0; first + i < last; ++i) {
    f(i, base + line * rows.line_stride + position * rows.token_stride);
    if (++position == rows.line) {
      position = 0;
      ++line;
    }
  }
}

// Calls f with a null pointer to the element type of dtype; float kernels serve the three small ones.
template <class Function>
inline void with_element(DType dtype, float, Function f) {
  switch (dtype) {
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
template <class Function>
inline void with_element(DType, double, Function f) {
  f(static_cast<double*>(nullptr));
}

// tile[i][0 .. width) = rows[first + i][0 .. width), and zero up to stride.
template <class Real>
inline void load_tile(const Rows& rows, int64_t first, int64_t last, int64_t width, int64_t stride, Real* tile) {
  with_element(rows.dtype, Real(), [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    if (width == kLanes && stride == kLanes) {  // a constant width makes straight-line code
      return for_rows<Element>(rows, first, last,
                               [&](int64_t i, const Element* row) { load_row(row, kLanes, tile + i * kLanes); });
    }
    for_rows<Element>(rows, first, last, [&](int64_t i, const Element* row) {
      load_row(row, width, tile + i * stride);
      for (int64_t j = width; j < stride; ++j) tile[i * stride + j] = 0;
    });
  });
}

// Fetches rows into the cache, a token at a time while others are worked on: along columns every row is another page,
// and waiting for all of them at once costs more than the scan.
class RowsAhead {
 public:
  RowsAhead(const Rows& rows, int64_t first, int64_t width)
      : line_(rows.line),
        position_(first % rows.line),
        bytes_(width * element_size(rows.dtype)),
        step_(rows.token_stride * element_size(rows.dtype)),
        jump_((rows.line_stride - (rows.line - 1) * rows.token_stride) * element_size(rows.dtype)),
        at_(static_cast<const char*>(rows.base) +
            (first / rows.line * rows.line_stride + position_ * rows.token_stride) * element_size(rows.dtype)) {}
  void next() {
    for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(at_ + i);
    __builtin_prefetch(at_ + bytes_ - 1);
    const bool ends = ++position_ == line_;
    at_ += ends ? jump_ : step_;
    if (ends) position_ = 0;
  }

 private:
  int64_t line_, position_, bytes_, step_, jump_;
  const char* at_;
};

}  // namespace
}  // namespace diffmf::cpu::DIFFMF_ISA
