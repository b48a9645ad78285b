// What the kernels of networks share: rows of fp32 or 16-bit numbers, and dot products of 32-bit
// words. Built once per instruction set, as simd.h is.
//
// A network's activations are rows: one row of C numbers per pixel (that is channels_last memory).
// Products read them as 32-bit words: one fp32 number, or two neighbouring bf16 numbers that
// avx512_bf16 multiplies and adds in one instruction. So one kernel serves both dtypes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/half.h"
#include "cpu/base/simd.h"

namespace vf::VF_ISA {

// ---- vectors of kLanes numbers ----------------------------------------------------------------

VF_INLINE F32 splat(float x) { return x - F32{}; }

VF_INLINE F32 maximum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

VF_INLINE F32 minimum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

VF_INLINE float sum_of(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

VF_INLINE F32 load_row(const float* p) { return load<F32>(p); }

VF_INLINE F32 load_row(const BFloat16* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
  F32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = bits_to_float(uint32_t(p[i].bits) << 16);
  return x;
#endif
}

VF_INLINE F32 load_row(const Half* p) { return widen(p); }

VF_INLINE void store_row(Half* p, F32 x) { narrow(p, x); }

VF_INLINE void store_row(float* p, F32 x) { store(p, x); }

VF_INLINE void store_row(BFloat16* p, F32 x) {
#if defined(__AVX512BF16__)
  const __m256bh y = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &y, sizeof y);
#elif defined(__AVX512F__)
  store(p, _mm512_cvtepi32_epi16((__m512i)rounded(x)));
#else
  const U32 y = rounded(x);
  for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(y[i]);
#endif
}

// Two neighbouring vectors of a row.
VF_INLINE void store_row(float* p, F32 x, F32 y) {
  store(p, x);
  store(p + kLanes, y);
}

VF_INLINE void store_row(Half* p, F32 x, F32 y) {
  narrow(p, x);
  narrow(p + kLanes, y);
}

VF_INLINE void store_row(BFloat16* p, F32 x, F32 y) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  std::memcpy(p, &both, sizeof both);
#else
  store_row(p, x);
  store_row(p + kLanes, y);
#endif
}

// The first n < kLanes numbers of a row's end; the other lanes are 0, or not written.
template <class T>
VF_INLINE F32 load_row(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load_row(buffer);
}

template <class T>
VF_INLINE void store_row(T* p, F32 x, int n) {
  T buffer[kLanes];
  store_row(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// body(c, n) for every kLanes columns of `width`; n = kLanes but in a last part that is shorter.
template <class Body>
VF_INLINE void for_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes);
  if (c < width) body(c, int(width - c));
}

// Those of a vector at column c that a row has.
VF_INLINE int columns_left(int64_t width, int64_t c) {
  return int(std::clamp<int64_t>(width - c, 0, kLanes));
}

template <class T>
VF_INLINE F32 load_columns(const T* p, int n) {
  return n == kLanes ? load_row(p) : load_row(p, n);
}

template <class T>
VF_INLINE void store_columns(T* p, F32 x, int n) {
  n == kLanes ? store_row(p, x) : store_row(p, x, n);
}

// ---- 32-bit words ------------------------------------------------------------------------------

template <class T>
constexpr int kPerWord = int(4 / sizeof(T));

VF_INLINE U32 broadcast(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - U32{};
}

// acc + the products of the numbers in two words, lane by lane.
template <class T>
VF_INLINE F32 dot(F32 acc, U32 a, U32 b);

template <>
inline F32 dot<float>(F32 acc, U32 a, U32 b) {
  return acc + reinterpret_cast<F32>(a) * reinterpret_cast<F32>(b);
}

template <>
inline F32 dot<BFloat16>(F32 acc, U32 a, U32 b) {
#if defined(__AVX512BF16__)
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += reinterpret_cast<F32>(a << 16) * reinterpret_cast<F32>(b << 16);
  return acc + reinterpret_cast<F32>(a & 0xffff0000u) * reinterpret_cast<F32>(b & 0xffff0000u);
#endif
}

// fp16 in the low halves of words. There is no instruction for their products here.
VF_INLINE F32 widen_words(U32 words) {
  Half lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i].bits = uint16_t(words[i]);
  return widen(lanes);
}

VF_INLINE U32 narrow_words(F32 x) {
  Half lanes[kLanes];
  narrow(lanes, x);
  U32 words;
  for (int i = 0; i < kLanes; ++i) words[i] = lanes[i].bits;
  return words;
}

template <>
inline F32 dot<Half>(F32 acc, U32 a, U32 b) {
  acc += widen_words(a) * widen_words(b);
  return acc + widen_words(a >> 16) * widen_words(b >> 16);
}

// The words that hold `even` and `odd`: for fp32 there is no odd one.
template <class T>
VF_INLINE U32 words_of(F32 even, F32 odd);

template <>
inline U32 words_of<float>(F32 even, F32) {
  return reinterpret_cast<U32>(even);
}

template <>
inline U32 words_of<Half>(F32 even, F32 odd) {
  return narrow_words(even) | narrow_words(odd) << 16;
}

template <>
inline U32 words_of<BFloat16>(F32 even, F32 odd) {
#if defined(__AVX512BF16__)
  // [even 16 | odd 16] -> pairs
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (U32)_mm512_permutexvar_epi16(order, halves);
#else
  return rounded(even) | rounded(odd) << 16;
#endif
}

// The numbers in words: what words_of was given.
template <class T>
VF_INLINE void numbers_of(U32 words, F32 (&out)[kPerWord<T>]) {
  if constexpr (kPerWord<T> == 1) {
    out[0] = reinterpret_cast<F32>(words);
  } else {
    out[0] = reinterpret_cast<F32>(words << 16);
    out[1] = reinterpret_cast<F32>(words & 0xffff0000u);
  }
}

// 16 vectors of 16 words, turned; for 512-bit vectors alone.
VF_INLINE void transpose_16(U32* r) {
#if defined(__AVX512F__)
  __m512i t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) u[i] = (__m512i)r[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(u[2 * i], u[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(u[2 * i], u[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = (U32)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = (U32)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = (U32)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = (U32)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
#else
  (void)r;
#endif
}

// Lane i of out[w] = word w of row i, or 0 where i >= rows; rows lie `stride` bytes apart.
VF_INLINE void load_columns_of_words(const char* p, int64_t stride, int rows, int words, U32* out) {
#if defined(__AVX512F__)
  for (int w = 0; w < words; w += 16) {
    const __mmask16 mask = words - w >= 16 ? 0xffff : __mmask16((1u << (words - w)) - 1);
    U32 block[16];
    if (rows == 16) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        block[i] = (U32)_mm512_maskz_loadu_epi32(mask, p + i * stride + 4 * w);
    } else {
      for (int i = 0; i < 16; ++i)
        block[i] = i < rows ? (U32)_mm512_maskz_loadu_epi32(mask, p + i * stride + 4 * w) : U32{};
    }
    transpose_16(block);
    for (int i = 0; i < std::min(16, words - w); ++i) out[w + i] = block[i];
  }
#else
  for (int w = 0; w < words; ++w) {
    U32 column = {};
    for (int i = 0; i < rows; ++i) std::memcpy(&column[i], p + i * stride + 4 * w, 4);
    out[w] = column;
  }
#endif
}

// The other way: lane i of in[w] becomes word w of row i < rows.
VF_INLINE void store_columns_of_words(const U32* in, char* p, int64_t stride, int rows, int words) {
#if defined(__AVX512F__)
  for (int w = 0; w < words; w += 16) {
    const __mmask16 mask = words - w >= 16 ? 0xffff : __mmask16((1u << (words - w)) - 1);
    U32 block[16];
    for (int i = 0; i < 16; ++i) block[i] = w + i < words ? in[w + i] : U32{};
    transpose_16(block);
    for (int i = 0; i < rows; ++i)
      _mm512_mask_storeu_epi32(p + i * stride + 4 * w, mask, (__m512i)block[i]);
  }
#else
  for (int w = 0; w < words; ++w)
    for (int i = 0; i < rows; ++i) {
      const uint32_t word = in[w][i];
      std::memcpy(p + i * stride + 4 * w, &word, 4);
    }
#endif
}

// Calls run(T()) with the dtype's type.
template <class Run>
static inline void by_dtype(DType dtype, const Run& run) {
  if (dtype == DType::bf16) {
    run(BFloat16());
  } else if (dtype == DType::f16) {
    run(Half());
  } else {
    run(float());
  }
}

}  // namespace vf::VF_ISA
