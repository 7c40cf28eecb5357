// Exponentials (own approximations in float, at most 2 ulp off) and softplus (at most 4 ulp off). In double they are
// the C library's functions, lane by lane: for checking gradients rather than for speed.
#pragma once

#include "simd.h"

namespace diffmf::cpu::DIFFMF_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kSoftplusLimit = 20;  // torch's threshold: softplus(x) = x above it

// 2 P(r) with 2^r = 1 + r P(r) on [-1/2, 1/2], fitted for the relative error of 2^r: 2e-9, so 0.94 ulp in float.
inline FloatV twice_exp2_slope(FloatV r) {
  FloatV p = broadcast(2 * 0.00015353361959569156f);
  p = p * r + 2 * 0.0013398873852565885f;
  p = p * r + 2 * 0.00961843691766262f;
  p = p * r + 2 * 0.055503323674201965f;
  p = p * r + 2 * 0.24022647738456726f;
  return p * r + 2 * 0.6931471824645996f;
}

// Adding it to |t| < 2^21 rounds t to an integer i and leaves i + 126 in the low bits: the exponent field of 2^(i-1),
// which unlike 2^i stays finite to the end of the range (hence twice_exp2_slope).
constexpr float kRound = 12582912.f + 126.f;

// 2^t with t = factor * scale, |t| < 125, and, as a by-product, twice_exp2_slope of the fraction of t.
inline FloatV exp2_product(FloatV factor, FloatV scale, FloatV& slope) {
  const FloatV rounded = factor * scale + kRound;
  const FloatV r = factor * scale - (rounded - kRound);
  slope = twice_exp2_slope(r);
  return (slope * r + 2.f) * (FloatV)((IntV)rounded << 23);
}

// The same for any t: below 2^-125.5 the result is zero; overflow gives infinity; NaN stays NaN.
inline FloatV exp2(FloatV t, FloatV& slope) {
  return exp2_product(at_most(broadcast(129.f), at_least(broadcast(-126.f), t)), broadcast(1.f), slope);
}

#if defined(__AVX2__)
constexpr float kLog2ELow = 1.925963e-08f;  // what kLog2E leaves of log2(e)

// Adding it to |t| < 2^18 rounds t to eighths and leaves their number in the low bits.
constexpr float kRoundEighths = 12582912.f / 8;

// The bits of 2^(i / 8) less i << 20: adding j << 20 for a j that is i mod 8 multiplies by 2^((j - i) / 8).
constexpr int32_t kEighths[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

// 2^r 2^i for |r| <= 1/16 and rounded = i + kRoundEighths: half the polynomial (relative error 3e-8), and a table.
inline FloatV exp2_eighths(FloatV rounded, FloatV r) {
  FloatV p = broadcast(0.0554962218f);
  p = p * r + 0.240257630f;
  p = p * r + 0.693147214f;
  return (p * r + 1.f) * (FloatV)(((IntV)rounded << 20) + look_up(kEighths, (IntV)rounded));
}

// 2^t with t = factor * scale, |t| < 126, at most 2 ulp off.
inline FloatV exp2_bounded(FloatV factor, FloatV scale) {
  const FloatV rounded = factor * scale + kRoundEighths;
  return exp2_eighths(rounded, factor * scale - (rounded - kRoundEighths));
}

// exp(v) for v <= 0, the product with log2(e) in two parts; at least 2^-126, NaN stays NaN.
inline FloatV exp_nonpositive(FloatV v) {
  v = at_least(broadcast(-126 / kLog2E), v);
  const FloatV rounded = v * kLog2E + kRoundEighths;
  return exp2_eighths(rounded, v * kLog2E - (rounded - kRoundEighths) + v * kLog2ELow);
}
#else
inline FloatV exp2_bounded(FloatV factor, FloatV scale) {
  FloatV slope;
  return exp2_product(factor, scale, slope);
}

// exp(v) for v <= 0, its argument reduced in two parts (Cody and Waite) so that the product with log2(e) costs nothing;
// zero below -87, NaN stays NaN.
inline FloatV exp_nonpositive(FloatV v) {
  v = at_least(broadcast(-126 * 0.693147181f), v);
  const FloatV rounded = v * kLog2E + kRound, i = rounded - kRound;
  const FloatV r = (v - i * 0.693359375f + i * 2.12194440e-4f) * kLog2E;
  return (twice_exp2_slope(r) * r + 2.f) * (FloatV)((IntV)rounded << 23);
}
#endif

// What multiplies A before decay(): float works in powers of two.
template <class Real>
constexpr Real kDecayScale = 1;
template <>
constexpr float kDecayScale<float> = kLog2E;
// Where |step * A * kDecayScale| is at most this, decay() may be called as Bounded, which saves the clamping.
constexpr float kDecayBound = 125;

// exp(step * A) with scaled = A * kDecayScale and, when Zoh, bbar = (exp(step * A) - 1) / A.
template <bool Zoh, bool Bounded>
inline FloatV decay(FloatV step, FloatV scaled, FloatV inverse, FloatV& bbar) {
  if (Bounded && !Zoh) return exp2_bounded(step, scaled);
  FloatV slope;
  const FloatV e = Bounded ? exp2_product(step, scaled, slope) : exp2(step * scaled, slope);
  // Without an integer part 2^t - 1 is t P(t) without cancellation, and t / A = step * log2(e).
  if (Zoh) bbar = absolute(step * scaled) < 0.5f ? step * slope * (0.5f * kLog2E) : (e - 1.f) * inverse;
  return e;
}

template <bool Zoh, bool>
inline DoubleV decay(DoubleV step, DoubleV scaled, DoubleV, DoubleV& bbar) {
  DoubleV e{};
  for (int i = 0; i < kWidth<double>; ++i) {
    const double z = step[i] * scaled[i];
    e[i] = std::exp(z);
    if (Zoh) bbar[i] = z == 0 ? step[i] : std::expm1(z) / scaled[i];
  }
  return e;
}

// d bbar / d A = (step * exp(z) - bbar) / A with z = step * A, by its series where that would cancel.
inline FloatV bbar_slope(FloatV step, FloatV a, FloatV inverse, FloatV e, FloatV bbar) {
  const FloatV z = step * a;
  FloatV p = broadcast(2.1846648451173678e-05f);
  p = p * z + 0.00017851078882813454f;
  p = p * z + 0.0011913790367543697f;
  p = p * z + 0.0069414773024618626f;
  p = p * z + 0.03333279862999916f;
  p = p * z + 0.12500056624412537f;
  p = p * z + 0.33333340287208557f;
  p = p * z + 0.4999999701976776f;
  return absolute(z) < 1.f ? p * step * step : (step * e - bbar) * inverse;
}

inline DoubleV bbar_slope(DoubleV step, DoubleV a, DoubleV inverse, DoubleV e, DoubleV bbar) {
  DoubleV slope{};
  for (int i = 0; i < kWidth<double>; ++i) {
    const double z = step[i] * a[i];
    if (std::fabs(z) < 1) {
      // sum_k z^k (k + 1) / (k + 2)!, to below 1e-17
      double term = 0.5, sum = 0.5;
      for (int k = 1; k < 18; ++k) {
        term *= z * (k + 1) / (k * (k + 2.0));
        sum += term;
      }
      slope[i] = sum * step[i] * step[i];
    } else {
      slope[i] = (step[i] * e[i] - bbar[i]) * inverse[i];
    }
  }
  return slope;
}

// log(1 + exp(v)), or v itself above torch's threshold; when Slope also its derivative.
template <bool Slope>
inline FloatV softplus(FloatV v, FloatV& slope) {
  const FloatV e = exp_nonpositive(-absolute(v));
  // log1p(e) = 2 atanh(s)
  const FloatV s = e / (e + 2.f);
  const FloatV s2 = s * s;
  FloatV p = broadcast(0.2802445888519287f);
  p = p * s2 + 0.27999141812324524f;
  p = p * s2 + 0.4002169966697693f;
  p = p * s2 + 0.6666641235351562f;
  const FloatV log1p = s * (p * s2 + 2.f);
  if (Slope) {
    const FloatV inverse = 1.f / (e + 1.f);
    slope = v > kSoftplusLimit ? broadcast(1.f) : (v < 0.f ? e * inverse : inverse);
  }
  return v > kSoftplusLimit ? v : at_least(FloatV{}, v) + log1p;
}

template <bool Slope>
inline DoubleV softplus(DoubleV v, DoubleV& slope) {
  DoubleV result{};
  for (int i = 0; i < kWidth<double>; ++i) {
    const double e = std::exp(v[i]);
    const bool linear = v[i] > kSoftplusLimit;
    result[i] = linear ? v[i] : std::log1p(e);
    if (Slope) slope[i] = linear ? 1 : e / (e + 1);
  }
  return result;
}

}  // namespace
}  // namespace diffmf::cpu::DIFFMF_ISA
