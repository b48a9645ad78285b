// Shadows the toolkit's header: fp16 as storage, with the conversions of csrc/common/half.h.
#pragma once
#include "common/half.h"
#include "cuda_runtime.h"

struct __half {
  vf::Half stored;
};
static_assert(sizeof(__half) == 2 && alignof(__half) == 2);

inline float __half2float(__half x) { return vf::half_to_float(x.stored); }
inline __half __float2half_rn(float x) { return {vf::float_to_half(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
