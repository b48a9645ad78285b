// Shadows csrc/common/cuda_mma.h, which has the layout: every lane shows its words of a and b to
// the others, and sums its own elements of d.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace vf {

inline float mma_element(__half x) { return __half2float(x); }
inline float mma_element(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
void warp_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Words {
    uint32_t a[4], b[2];
  } mine;
  static_assert(sizeof(Words) == sizeof(emulation::Exchanged));
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const Words* lanes = reinterpret_cast<const Words*>(emulation::exchange(
      kEmulatedFullMask, "mma", emulation::bit_cast<emulation::Exchanged>(mine)));
  const auto element = [](uint32_t word, int half) {
    return mma_element(emulation::bit_cast<T>(uint16_t(word >> 16 * half)));
  };
  const int lane = int(threadIdx.x) % warpSize, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, high = k / 8;  // the lane of a quad that has k, and the word
      const uint32_t of_a = lanes[4 * g + from].a[2 * high + upper];
      const uint32_t of_b = lanes[4 * column + from].b[high];
      sum += double(element(of_a, k % 2)) * double(element(of_b, k % 2));
    }
    d[i] = float(sum);
  }
}

}  // namespace vf
