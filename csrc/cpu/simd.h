// Vectors of the instruction set a file is compiled for. Everything here has internal linkage: the same names are
// compiled for several instruction sets, and the linker must never let one stand in for another.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "scan.h"

namespace diffmf::cpu::DIFFMF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongV __attribute__((vector_size(kVectorBytes)));

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

template <class Real>
constexpr int kWidth = kVectorBytes / sizeof(Real);
// Vectors in a block of kLanes channels.
template <class Real>
constexpr int kBlockVectors = kLanes / kWidth<Real>;

template <class Real>
inline Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

template <class Real>
inline Vector<Real> load(const Real* p) {
  typedef Vector<Real> Aliasing __attribute__((__may_alias__));
  return *reinterpret_cast<const Aliasing*>(p);
}

template <class Real>
inline void store(Real* p, Vector<Real> v) {
  typedef Vector<Real> Aliasing __attribute__((__may_alias__));
  *reinterpret_cast<Aliasing*>(p) = v;
}

// The larger and the smaller of limit and v; v where it is NaN.
inline FloatV at_least(FloatV limit, FloatV v) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_max_ps((__m512)limit, (__m512)v);
#elif defined(__AVX__)
  return (FloatV)_mm256_max_ps((__m256)limit, (__m256)v);
#elif defined(__SSE2__)
  return (FloatV)_mm_max_ps((__m128)limit, (__m128)v);
#else
  return limit > v ? limit : v;
#endif
}

inline FloatV at_most(FloatV limit, FloatV v) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_min_ps((__m512)limit, (__m512)v);
#elif defined(__AVX__)
  return (FloatV)_mm256_min_ps((__m256)limit, (__m256)v);
#elif defined(__SSE2__)
  return (FloatV)_mm_min_ps((__m128)limit, (__m128)v);
#else
  return limit < v ? limit : v;
#endif
}

// v in the lanes where mask has all bits set, zero where it has none (also in place of NaN).
inline FloatV keep(FloatV v, FloatV mask) { return (FloatV)((IntV)v & (IntV)mask); }
inline DoubleV keep(DoubleV v, DoubleV mask) { return (DoubleV)((LongV)v & (LongV)mask); }

inline FloatV absolute(FloatV v) { return (FloatV)((IntV)v & 0x7fffffff); }

// Entry `index` mod 8 of the table, in each lane.
#if defined(__AVX512F__)
inline IntV look_up(const int32_t* table, IntV index) {
  const __m512i entries = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  return (IntV)_mm512_permutexvar_epi32((__m512i)index, entries);
}
#elif defined(__AVX2__)
inline IntV look_up(const int32_t* table, IntV index) {
  return (IntV)_mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)), (__m256i)index);
}
#endif

// Lane i of the result is the sum of the lanes of row i.
#if defined(__AVX__)
inline __m256 row_sums8(__m256 r0, __m256 r1, __m256 r2, __m256 r3, __m256 r4, __m256 r5, __m256 r6, __m256 r7) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(r0, r1), _mm256_hadd_ps(r2, r3));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(r4, r5), _mm256_hadd_ps(r6, r7));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#endif

template <class Real>
inline void row_sums(const Real* rows /* [kWidth][kWidth] */, Real* sums /* [kWidth] */) {
  for (int i = 0; i < kWidth<Real>; ++i) {
    Real sum = 0;
    for (int j = 0; j < kWidth<Real>; ++j) sum += rows[i * kWidth<Real> + j];
    sums[i] = sum;
  }
}

#if defined(__AVX512F__)
template <>
inline void row_sums(const float* rows, float* sums) {
  for (int i = 0; i < 16; i += 8) {
    __m256 half[8];
    for (int j = 0; j < 8; ++j) {
      const float* row = rows + (i + j) * 16;
      half[j] = _mm256_add_ps(_mm256_load_ps(row), _mm256_load_ps(row + 8));
    }
    _mm256_storeu_ps(sums + i, row_sums8(half[0], half[1], half[2], half[3], half[4], half[5], half[6], half[7]));
  }
}
#elif defined(__AVX__)
template <>
inline void row_sums(const float* rows, float* sums) {
  __m256 r[8];
  for (int j = 0; j < 8; ++j) r[j] = _mm256_load_ps(rows + j * 8);
  _mm256_storeu_ps(sums, row_sums8(r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]));
}
#elif defined(__SSE2__)
template <>
inline void row_sums(const float* rows, float* sums) {
  __m128 r0 = _mm_load_ps(rows), r1 = _mm_load_ps(rows + 4), r2 = _mm_load_ps(rows + 8), r3 = _mm_load_ps(rows + 12);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(r0, r1), _mm_add_ps(r2, r3)));
}
#endif

// Flushes results below the normal range to zero while it lives: a state that decays through the subnormal numbers
// would cost a microcode assist (over a hundred cycles) at every step.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}  // other processors have no such assist
#endif
};

}  // namespace
}  // namespace diffmf::cpu::DIFFMF_ISA
