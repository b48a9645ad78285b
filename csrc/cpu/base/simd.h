// fp32 vectors of one instruction set, for the files in csrc/cpu: F32, a Pair of them, VectorLanes.
//
// Those files are compiled once per instruction set. Everything here lives in the namespace VF_ISA,
// so that the linker cannot give the baseline build a function compiled for AVX-512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define VF_INLINE static inline __attribute__((always_inline))

namespace vf::VF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(4 * kLanes)));
typedef uint64_t U64 __attribute__((vector_size(4 * kLanes)));

template <class V>
static inline V load(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class V>
static inline void store(void* p, V x) {
  std::memcpy(p, &x, sizeof x);
}

// ---- 2 kLanes neighbours of a clip ----------------------------------------------------------
//
// Elementwise work does not care in which order the elements sit in the two vectors, so every dtype
// takes the order that is cheapest to reach. Pairs of one dtype fit each other.

constexpr int kPair = 2 * kLanes;

struct Pair {
  F32 at[2];
};

// fp32: the first half, the second half.
static inline Pair load_pair(const float* p) { return {load<F32>(p), load<F32>(p + kLanes)}; }

static inline void store_pair(float* p, const Pair& x) {
  store(p, x.at[0]);
  store(p + kLanes, x.at[1]);
}

// bf16: the even elements, the odd ones. A bf16 is the upper half of an fp32.
static inline Pair load_pair(const BFloat16* p) {
  const U32 words = load<U32>(p);
  return {reinterpret_cast<F32>(words << 16), reinterpret_cast<F32>(words & 0xffff0000u)};
}

// (a + b + 1) / 2 of unsigned 16-bit words, without overflow.
static inline U16 average(U16 a, U16 b) {
#if defined(__AVX512BW__)
  return (U16)_mm512_avg_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U16)_mm256_avg_epu16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U16)_mm_avg_epu16((__m128i)a, (__m128i)b);
#else
  return (a | b) - ((a ^ b) >> 1);
#endif
}

// x, or the NaN that arithmetic makes where x is another.
static inline float plain_nan(float x) { return x == x ? x : bits_to_float(0x7fc00000u); }

// Rounds to nearest even, all words at once: upper + 1 where lower + 0x7fff + (upper odd) carries.
// A NaN must have nothing in its lower half, or the carry could make it a number: so have those
// that come from bf16 operands, and those of `plain_nan`.
static inline void store_pair(BFloat16* p, const Pair& x) {
  const U32 even = reinterpret_cast<U32>(x.at[0]), odd = reinterpret_cast<U32>(x.at[1]);
  const U16 upper = reinterpret_cast<U16>(even >> 16 | (odd & 0xffff0000u));
  const U16 lower = reinterpret_cast<U16>((even & 0xffffu) | odd << 16);
  const U16 carry = average(lower, (upper & uint16_t(1)) | uint16_t(0x7ffe)) >> 15;
  store(p, upper + carry);
}

// bf16 of each lane, in the low half of its word; to nearest even, and any NaN stays one. Twice the
// instructions of `store_pair`, which is for NaNs as frame ops make them.
VF_INLINE U32 rounded(F32 x) {
  const U32 bits = reinterpret_cast<U32>(x);
  const U32 out = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? U32{} + 0x7fc0u : out;
}

// fp16: the first half, the second half.
static inline F32 widen(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
  F32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
  return x;
#endif
}

static inline void narrow(Half* p, F32 x) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
#endif
}

static inline Pair load_pair(const Half* p) { return {widen(p), widen(p + kLanes)}; }

static inline void store_pair(Half* p, const Pair& x) {
  narrow(p, x.at[0]);
  narrow(p + kLanes, x.at[1]);
}

// ---- the lanes of common/noise.h ------------------------------------------------------------

struct VectorLanes {
  using F = F32;
  using I = I32;
  using U = U32;
  using W = U64;  // a random word in the low half of each lane, anything in the high one

  static inline U64 product(W a, uint32_t b) {
#if defined(__AVX512F__)
    return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
  }
  static inline W high_word(U64 product) { return product >> 32; }
  static inline W low_word(U64 product) { return product; }

  static inline F convert(I x) { return __builtin_convertvector(x, F32); }
  static inline F square_root(F x) {
#if defined(__AVX512F__)
    return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (F32)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
    return x;
#endif
  }
  static inline void exchange_if(I negative, F* a, F* b) {
    const I swap = (as_int(*a) ^ as_int(*b)) & (negative >> 31);
    *a = as_float(as_int(*a) ^ swap);
    *b = as_float(as_int(*b) ^ swap);
  }
  static inline F as_float(I bits) { return reinterpret_cast<F32>(bits); }
  static inline I as_int(F x) { return reinterpret_cast<I32>(x); }
};

// In every 128-bit quarter, half or whole of the vectors: low: a0 b0 a1 b1, high: a2 b2 a3 b3.
static inline void zip(F32 a, F32 b, F32* low, F32* high) {
#if defined(__AVX512F__)
  *low = (F32)_mm512_unpacklo_ps((__m512)a, (__m512)b);
  *high = (F32)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  *low = (F32)_mm256_unpacklo_ps((__m256)a, (__m256)b);
  *high = (F32)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  *low = F32{a[0], b[0], a[1], b[1]};
  *high = F32{a[2], b[2], a[3], b[3]};
#endif
}

}  // namespace vf::VF_ISA
