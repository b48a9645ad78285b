// The transforms of Winograd's form F(2, 3), of one dimension, and what gradients go through: the
// transposes of the last two (Lavin and Gray 2016, arXiv 1509.09308). In two dimensions each is
// done along one, then along the other.
#pragma once
#include "cpu/base/simd.h"

namespace vf::VF_ISA {

VF_INLINE void transform_in(const F32 (&d)[4], F32 (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}

VF_INLINE void transform_out(const F32 (&m)[4], F32 (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

VF_INLINE void transform_taps(const F32 (&g)[3], F32 (&t)[4]) {
  const F32 half = 0.5f * (g[0] + g[2]);
  t[0] = g[0];
  t[1] = half + 0.5f * g[1];
  t[2] = half - 0.5f * g[1];
  t[3] = g[2];
}

// Of the gradient of results y to that of the products m.
VF_INLINE void transform_results(const F32 (&y)[2], F32 (&m)[4]) {
  m[0] = y[0];
  m[1] = y[0] + y[1];
  m[2] = y[0] - y[1];
  m[3] = -y[1];
}

// Of the gradient of transformed taps t to that of the taps g.
VF_INLINE void transform_to_taps(const F32 (&t)[4], F32 (&g)[3]) {
  const F32 half = 0.5f * (t[1] + t[2]);
  g[0] = t[0] + half;
  g[1] = 0.5f * (t[1] - t[2]);
  g[2] = half + t[3];
}

}  // namespace vf::VF_ISA
