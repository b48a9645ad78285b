// A warp's product of small matrices on tensor cores: d += a b, a [16, 16], b [16, 8], d [16, 8].
//
// Lane 4 g + t holds (PTX ISA, mma.m16n8k16, fragments of 16-bit types), two elements a word:
//
//   a  words 0 to 3: rows g, g + 8, g, g + 8; columns 2t, 2t + 1, of the last two words 8 more
//   b  words 0, 1:   rows 2t, 2t + 1, of the second 8 more; column g
//   d  0 to 3:       rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
//
// Of the whole warp. tests/tools/emulation has the same in plain C++.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vf {

template <class T>
__device__ __forceinline__ void warp_mma(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#define VF_MMA(type)                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>)
    VF_MMA("f16");
  else
    VF_MMA("bf16");
#undef VF_MMA
}

}  // namespace vf
