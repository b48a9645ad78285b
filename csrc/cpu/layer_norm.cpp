// y = (x - mu) / sqrt(var + eps) weight + bias of every row
//
// A task is a few rows; cpu/norm.h has the arithmetic.
#include "layer_norm.h"

#include "cpu/base/parallel.h"
#include "cpu/norm.h"

namespace vf::VF_ISA {

template <class T>
static void layer_norm(const LayerNormArgs& a, int64_t threads) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int64_t block = std::max<int64_t>(1, 16384 / a.channels);
  parallel_for((a.rows + block - 1) / block, threads, [&](int64_t task) {
    const int64_t first = task * block, rows = std::min(a.rows - first, block);
    layer_norm_rows(x + first * a.channels, a.weight, a.bias, out + first * a.channels, rows,
                    a.channels, a.eps);
  });
}

void layer_norm_cpu(const LayerNormArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { layer_norm<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
