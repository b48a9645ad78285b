// Shadows the toolkit's header: bf16 as storage. Rounding is to nearest even; a NaN stays one.
#pragma once
#include "common/half.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  vf::BFloat16 stored;
};
static_assert(sizeof(__nv_bfloat16) == 2 && alignof(__nv_bfloat16) == 2);

inline float __bfloat162float(__nv_bfloat16 x) { return vf::bits_to_float(x.stored.bits << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {{uint16_t(0x7fff)}};  // rounding could carry a NaN over to zero
  const uint32_t bits = vf::float_to_bits(x);
  const uint32_t to_nearest_even = 0x7fffu + (bits >> 16 & 1u);
  return {{uint16_t((bits + to_nearest_even) >> 16)}};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
