// The functions that activations need, a vector at a time: to fp32 accuracy for fp32 rows, well
// below a rounding for 16-bit rows. Built once per instruction set, as simd.h is.
#pragma once
#include "cpu/base/rows.h"

namespace vf::VF_ISA {

constexpr float kLog2E = 1.44269504089f;

// exponential<T>(x kExponent<T>) is e^x: 16-bit rows take powers of two, whose factor their callers
// have to multiply by something else anyway; fp32 rows need every digit of x.
template <class T>
constexpr float kExponent = sizeof(T) == 4 ? 1.0f : kLog2E;

// For x <= 88; 0 where fp32 has no such number.
template <class T>
VF_INLINE F32 exponential(F32 x) {
  F32 f, n, p;
  [[maybe_unused]] const F32 given = x;
  if constexpr (sizeof(T) == 4) {
    x = maximum(x, splat(-104.0f));
    n = (x * kLog2E + 0x1.8p23f) - 0x1.8p23f;
    f = x - n * 0x1.62e4p-1f;  // ln 2, whose first part has few digits
    f = f - n * 1.42860677e-06f;
    p = f * 0.00138146104f + 0.00836871099f;
    p = p * f + 0.041668389f;
    p = p * f + 0.166665211f;
    p = p * f + 0.49999994f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
  } else {
#if defined(__AVX512F__)
    f = (F32)_mm512_reduce_ps((__m512)x, 0);  // x - round(x)
    n = x - f;
#else
    x = maximum(x, splat(-126.0f));
    n = (x + 0x1.8p23f) - 0x1.8p23f;
    f = x - n;
#endif
    p = f * 0.0551716685f + 0.242611125f;
    p = p * f + 0.693260968f;
    p = p * f + 0.999928057f;
  }
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  n = maximum(n, splat(-126.0f));
  const F32 y = p * reinterpret_cast<F32>((__builtin_convertvector(n, I32) + 127) << 23);
  return given < (sizeof(T) == 4 ? -87.0f : -125.5f) ? F32{} : y;
#endif
}

template <class T>
VF_INLINE F32 reciprocal(F32 x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) return (F32)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.0f / x;
}

template <class T>
VF_INLINE F32 silu(F32 x) {
  const F32 y = maximum(x, splat(-87.0f));  // beyond, e^-x has no fp32, and the result is about 0
  return x * reciprocal<T>(1.0f + exponential<T>(y * -kExponent<T>));
}

// x / (1 + e^(-1.702 x)).
template <class T>
VF_INLINE F32 quick_gelu(F32 x) {
  const F32 y = maximum(x, splat(-51.0f));  // as in silu
  return x * reciprocal<T>(1.0f + exponential<T>(y * (-1.702f * kExponent<T>)));
}

// Φ(x): for fp32 with a rational erf, within a few roundings; for 16-bit rows with a fit of Φ's
// logit, within 2.5e-5 of gelu.
template <class T>
VF_INLINE F32 normal_cdf(F32 x) {
  if constexpr (sizeof(T) == 2) {
    const F32 y = minimum(x * x, splat(64.0f));
    F32 p = y * -7.03033588e-04f + 7.40112921e-02f;
    p = p * y + 1.59501577f;
    return reciprocal<T>(1.0f + exponential<T>(minimum(x * p * -kLog2E, splat(126.0f))));
  }
  const F32 z = maximum(minimum(x * 0.70710678f, splat(4.0f)), splat(-4.0f)), t = z * z;
  F32 p = t * 1.91105762e-08f + -1.94231302e-06f;
  p = p * t + 0.000147289829f;
  p = p * t + 0.00399073213f;
  p = p * t + 0.0515253916f;
  p = p * t + 0.207129166f;
  p = p * t + 1.12837911f;
  F32 q = t * 0.00102114992f + 0.0149583975f;
  q = q * t + 0.117972359f;
  q = q * t + 0.516894698f;
  q = q * t + 1.0f;
  return 0.5f + 0.5f * maximum(minimum(z * p / q, splat(1.0f)), splat(-1.0f));
}

template <class T>
VF_INLINE F32 gelu(F32 x) {
  return x * normal_cdf<T>(x);
}

}  // namespace vf::VF_ISA
