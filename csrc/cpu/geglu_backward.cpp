// The gradient of y = a gelu(b): see geglu_backward.h.
//
// A task is a few rows. One read of grad and x and one write of out.
#include "geglu_backward.h"

#include "cpu/base/math.h"
#include "cpu/base/parallel.h"

namespace vf::VF_ISA {

template <class T>
static void geglu_backward(const GegluBackwardArgs& a, int64_t threads) {
  const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int64_t block = std::max<int64_t>(1, 16384 / a.width);
  parallel_for((a.rows + block - 1) / block, threads, [&](int64_t task) {
    const int64_t last = std::min(a.rows, (task + 1) * block);
    for (int64_t r = task * block; r < last; ++r) {
      const T* row = x + r * 2 * a.width;
      T* to = out + r * 2 * a.width;
      for_columns(a.width, [&](int64_t c, int n) {
        const F32 g = load_columns(grad + r * a.width + c, n);
        const F32 value = load_columns(row + c, n), gate = load_columns(row + a.width + c, n);
        const F32 cdf = normal_cdf<T>(gate);
        const F32 density = exponential<T>(gate * gate * (-0.5f * kExponent<T>)) * 0.398942280f;
        store_columns(to + c, g * gate * cdf, n);
        store_columns(to + a.width + c, g * value * (cdf + gate * density), n);
      });
    }
  });
}

void geglu_backward_cpu(const GegluBackwardArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { geglu_backward<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
