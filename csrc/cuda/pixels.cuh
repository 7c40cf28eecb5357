// What the memory-bound kernels on channels-last pixels share: packs of neighbouring channels as one load or store,
// their conversion to float, and the sigmoid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace diffmf {
namespace cuda {

// N neighbouring channels, moved at once. sizeof(T) * N is at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }

template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, typename T>
__device__ inline void widen(const Pack<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(from.v[i]);
}
template <int N, typename T>
__device__ inline void store_pack(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(from[i], pack.v[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}
template <int N, typename T>
__device__ inline Pack<T, N> zero_pack() {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(0.f, pack.v[i]);
  return pack;
}

__device__ inline float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

// d/dv of v * s, with s = sigmoid(v).
__device__ inline float silu_slope(float v, float s) { return s * fmaf(v, 1.f - s, 1.f); }

}  // namespace cuda
}  // namespace diffmf
