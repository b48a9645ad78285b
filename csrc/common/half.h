// fp16 and bf16 as storage, without torch and without compiler half types: arithmetic is fp32.
// Rounding is to nearest even, as torch rounds; a NaN stays a NaN.
#pragma once
#include <cstdint>
#include <cstring>

namespace vf {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float half_to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity, NaN (made quiet, as the hardware does)
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 |
                         (magnitude > 0x7c00u ? 0x400000u : 0u));
  if (magnitude < 0x400u)  // zero, subnormal: a multiple of 2^-24
    return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

static inline Half float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN
  } else if (magnitude >= 0x477ff000u) {
    out = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns 2^-24 with the last bit of a float, which rounds for us.
    out = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return Half{uint16_t(sign | out)};
}

}  // namespace vf
