// Normals of one frame, in vectors: common/noise.h with the lanes of simd.h.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/noise.h"
#include "cpu/base/simd.h"

namespace vf::VF_ISA {

constexpr int64_t kBlock = 4 * kLanes;  // elements drawn at a time: a counter gives four

// A vector holds kLanes counters. After zipping, 128-bit part q of vector k holds the counters at
// positions 4 q + ..., so positions are given those counters that leave the elements in order:
// fp32 and fp16 want all four elements of a counter together, bf16 the even and the odd ones apart
// (the orders of Pair).
template <class T>
constexpr int counter_at(int position) {
  const int part = position / 4, within = position % 4;
  return within * (kLanes / 4) + part;
}
template <>
constexpr int counter_at<BFloat16>(int position) {
  const int part = position / 4, within = position % 4;
  return within / 2 * (kLanes / 2) + 2 * part + within % 2;
}

// The words of counters first_counter + counter_at<T>(position), at their positions.
template <class T>
static inline void draw_words(const NoiseSource& from, uint32_t first_counter, U32 words[4]) {
  U64 even[4], odd[4];  // positions 0, 2, 4 ... and 1, 3, 5 ...
  for (int i = 0; i < kLanes / 2; ++i) {
    even[0][i] = counter_at<T>(2 * i);
    odd[0][i] = counter_at<T>(2 * i + 1);
  }
  even[0] += uint64_t(first_counter);
  odd[0] += uint64_t(first_counter);
  const uint32_t rest[3] = {from.frame, from.sample, from.stream_and_step};
  for (int k = 1; k < 4; ++k) even[k] = odd[k] = U64{} + uint64_t(rest[k - 1]);
  philox4x32_10<VectorLanes>(even, from.keys);
  philox4x32_10<VectorLanes>(odd, from.keys);
  for (int k = 0; k < 4; ++k)
    words[k] = reinterpret_cast<U32>((even[k] & 0xffffffffu) | odd[k] << 32);
}

// Writes kBlock normals: the elements 4 first_counter ..., as pairs of T.
template <class T>
static inline void draw_block(const NoiseSource& from, uint32_t first_counter, float* to) {
  U32 words[4];
  draw_words<T>(from, first_counter, words);
  F32 n[4], even[2], odd[2];
  box_muller<VectorLanes>(words, n);
  zip(n[0], n[2], &even[0], &even[1]);
  zip(n[1], n[3], &odd[0], &odd[1]);
  for (int k = 0; k < 2; ++k) {
    F32 low = even[k], high = odd[k];
    if constexpr (!std::is_same_v<T, BFloat16>) zip(even[k], odd[k], &low, &high);
    store(to + k * kPair, low);
    store(to + k * kPair + kLanes, high);
  }
}

// Writes the elements first ... first + count of one frame, as pairs of T; first is a multiple of
// kBlock, and `to` has room for count rounded up to kBlock.
template <class T>
static inline void draw(const NoiseSource& from, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kBlock)
    draw_block<T>(from, uint32_t((first + i) / 4), to + i);
}

}  // namespace vf::VF_ISA
