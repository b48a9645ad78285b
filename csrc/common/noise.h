// The arithmetic of decomposed noise, shared by CPU and CUDA: Philox4x32-10 and Box-Muller.
//
//     key     = (seed mod 2^32, seed div 2^32)
//     counter = (e div 4, frame, sample, stream * 2^24 + step)       e = index within [C, H, W]
//     w       = philox4x32_10(counter, key)                          4 words, for e = 4k ... 4k+3
//     u = ((w >> 8) + 1) / 2^24 in (0, 1]    v = (w >> 8) / 2^24 in [0, 1)       exact in fp32
//     n_0 = sqrt(-2 ln u(w_0)) cos 2 pi v(w_1)    n_1 = sqrt(-2 ln u(w_0)) sin 2 pi v(w_1)
//     n_2, n_3: the same of w_2 and w_3
//
// Everything is a template over L, the lanes: plain numbers on CUDA, vectors on the CPU. Only
// operations that IEEE 754 rounds correctly are used (+, -, *, sqrt), in a fixed order and without
// FMA, so every device and instruction set returns the same bits. vfengine/ops/decomposed_noise.py
// has the same lines in PyTorch; kernels/noise.py has them in Triton.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace vf {

struct PhiloxKey {
  uint32_t lo, hi;
};

// A key and what it is in each further round: a CUDA kernel is given them, and need not add.
constexpr int kRounds = 10;
struct PhiloxKeys {
  PhiloxKey at[kRounds];

  VF_HOST_DEVICE PhiloxKeys(PhiloxKey key) {
    for (PhiloxKey& round : at) {
      round = key;
      key.lo += 0x9E3779B9u;
      key.hi += 0xBB67AE85u;
    }
  }
};

enum Stream : uint32_t { kBaseStream = 0, kResidualStream = 1 };
constexpr int kStepBits = 24;

// Word 3 of the counter. 0 is the initial noise, k + 1 what step k of a solver adds.
VF_HOST_DEVICE uint32_t stream_and_step(Stream stream, uint32_t step) {
  return uint32_t(stream) << kStepBits | step;
}

// Where the noise of one frame comes from: words 1 to 3 of the counter, and the key.
struct NoiseSource {
  uint32_t frame, sample, stream_and_step;
  PhiloxKeys keys;
};

// The lanes of one number, for CUDA; cpu/base/simd.h has those of vectors.
struct ScalarLanes {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  using W = uint32_t;  // a random word within philox4x32_10

  static VF_HOST_DEVICE uint64_t product(W a, uint32_t b) { return uint64_t(a) * b; }
  static VF_HOST_DEVICE W high_word(uint64_t product) { return W(product >> 32); }
  static VF_HOST_DEVICE W low_word(uint64_t product) { return W(product); }

  static VF_HOST_DEVICE F convert(I x) { return F(x); }
  // Of 0, or of a number in [2^-23, 34): those of `radius`. The instructions are the ones that nvcc
  // makes of sqrtf, but for its branch around other numbers, which kept neighbours apart.
  static VF_HOST_DEVICE F square_root(F x) {
#if defined(__CUDA_ARCH__)
    F root;
    asm("{ .reg .f32 inverse, half, error;\n"
        "rsqrt.approx.ftz.f32 inverse, %1;\n"
        "mul.rn.ftz.f32 %0, %2, inverse;\n"
        "mul.rn.ftz.f32 half, inverse, 0f3F000000;\n"
        "neg.f32 error, %0;\n"
        "fma.rn.f32 error, error, %0, %2;\n"
        "fma.rn.f32 %0, error, half, %0; }"
        : "=&f"(root)
        : "f"(fmaxf(x, 0x1p-24f)), "f"(x));
    return root;
#else
    return sqrtf(x);
#endif
  }
  // a and b in each other's place where `negative` is.
  static VF_HOST_DEVICE void exchange_if(I negative, F* a, F* b) {
    const F former = *a;
    *a = negative < 0 ? *b : *a;
    *b = negative < 0 ? former : *b;
  }
  static VF_HOST_DEVICE F as_float(I bits) {
    F x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  static VF_HOST_DEVICE I as_int(F x) {
    I bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
};

// Ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
template <class L>
VF_HOST_DEVICE void philox4x32_10(typename L::W c[4], const PhiloxKeys& keys) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const auto p0 = L::product(c[0], 0xD2511F53u), p1 = L::product(c[2], 0xCD9E8D57u);
    c[0] = L::high_word(p1) ^ c[1] ^ keys.at[round].lo;
    c[1] = L::low_word(p1);
    c[2] = L::high_word(p0) ^ c[3] ^ keys.at[round].hi;
    c[3] = L::low_word(p0);
  }
}

// sqrt(-2 ln((w + 1) / 2^24)) for w in [0, 2^24), to 1 unit in the last place.
//
// (w + 1) / 2^24 = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), and
// ln = e ln 2 + f - f^2 / 2 + f^3 p(f), p a minimax polynomial. e ln2_high is exact.
template <class L>
VF_HOST_DEVICE typename L::F radius(typename L::I w) {
  using F = typename L::F;
  using I = typename L::I;
  const I bits = L::as_int(L::convert(w + 1));
  const I from_root = bits - 0x3f3504f3;                                         // sqrt(1/2)
  const F e = L::as_float((from_root >> 23) + (0x4b400000 - 24)) - 12582912.0f;  // its bits
  const F f = L::as_float((from_root & 0x7fffff) + 0x3f3504f3) - 1.0f;
  F p = f * 0.06746640801429749f - 0.11675652116537094f;
  p = p * f + 0.11888162046670914f;
  p = p * f - 0.1240558922290802f;
  p = p * f + 0.14219552278518677f;
  p = p * f - 0.1666799634695053f;
  p = p * f + 0.2000211924314499f;
  p = p * f - 0.25000008940696716f;
  p = p * f + 0.3333331346511841f;
  const F ff = f * f;
  const F e_ln2 = e * 0.693145751953125f;  // 19 bits times 5 bits
  const F sum = e_ln2 + f;
  const F lost = (e_ln2 - sum) + f;  // what the sum was rounded by, exactly
  const F rest = (ff * 0.5f - (ff * f) * p) - e * 1.428606765330187e-06f;
  return L::square_root((sum + (lost - rest)) * -2.0f);
}

// cos and sin of 2 pi w / 2^24 for the upper 24 bits w of a word, to 1 unit in the last place.
//
// The angle is pi/2 (quadrant + f), f in [-1/2, 1/2) exact: 3 + f is what has f 2^22 added to the
// bits of 3. The quadrant is the upper two bits of `turned`.
template <class L>
VF_HOST_DEVICE void cos_and_sin(typename L::U word, typename L::F* cos, typename L::F* sin) {
  using F = typename L::F;
  using I = typename L::I;
  const auto turned = word + (1u << 29);
  const F f = L::as_float(((I)(word << 2) >> 10) + 0x40400000) - 3.0f;
  const F ff = f * f;
  F s = ff * 0.00015820674889255315f - 0.004681266378611326f;  // sin(pi/2 f) / f - 3/2
  s = s * ff + 0.07969257980585098f;
  s = s * ff - 0.6459640860557556f;
  s = s * ff + 0.07079632580280304f;
  s = f * 1.5f + f * s;                                       // f * 1.5 is exact
  F c = ff * -0.0009040216682478786f + 0.02086028829216957f;  // (1 - cos(pi/2 f)) / f^2 - 1
  c = c * ff - 0.25366923213005066f;
  c = c * ff + 0.2337005138397217f;
  const F rounded = 1.0f - ff;
  c = rounded + (((1.0f - rounded) - ff) - ff * c);
  L::exchange_if((I)(turned << 1), &c, &s);
  *cos = L::as_float(L::as_int(c) ^ (I)((turned + (1u << 30)) & 0x80000000u));
  *sin = L::as_float(L::as_int(s) ^ (I)(turned & 0x80000000u));
}

// The four normals of one counter, from its words.
template <class L>
VF_HOST_DEVICE void box_muller(const typename L::U words[4], typename L::F normals[4]) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int pair = 0; pair < 4; pair += 2) {
    typename L::F cos, sin;
    const typename L::F r = radius<L>((typename L::I)(words[pair] >> 8));
    cos_and_sin<L>(words[pair + 1], &cos, &sin);
    normals[pair] = r * cos;
    normals[pair + 1] = r * sin;
  }
}

}  // namespace vf
