// One fp32 vector per instruction set, for the files in csrc/cpu: F32, load, store.
//
// Those files are compiled once per instruction set. Everything here lives in the namespace VF_ISA,
// so that the linker cannot give the baseline build a function compiled for AVX-512.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace vf::VF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

static inline F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

static inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }

// 16-bit words to 32 and back; GCC makes a long way of __builtin_convertvector between sizes.
static inline U32 widen(const void* p) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  U16 words;
  std::memcpy(&words, p, sizeof words);
  return __builtin_convertvector(words, U32);
#endif
}

static inline void narrow(U32 x, void* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // per 128-bit half
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88)));
#else
  const U16 words = __builtin_convertvector(x, U16);
  std::memcpy(p, &words, sizeof words);
#endif
}

static inline F32 load(const BFloat16* p) { return reinterpret_cast<F32>(widen(p) << 16); }

static inline void store(BFloat16* p, F32 x) {
  const U32 bits = reinterpret_cast<U32>(x);
  const U32 is_nan = reinterpret_cast<U32>(x != x);
  const U32 to_nearest_even = 0x7fffu + (bits >> 16 & 1u);
  narrow(((bits | (is_nan & 0x400000u)) + (to_nearest_even & ~is_nan)) >> 16, p);
}

static inline F32 load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  F32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
  return x;
#endif
}

static inline void store(Half* p, F32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
#endif
}

}  // namespace vf::VF_ISA
