// y = x[:, :width] gelu(x[:, width:]) of every row
//
// A task is a few rows. One read of x and one write of y.
#include "geglu.h"

#include "cpu/base/math.h"
#include "cpu/base/parallel.h"

namespace vf::VF_ISA {

template <class T>
static void geglu(const GegluArgs& a, int64_t threads) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int64_t block = std::max<int64_t>(1, 16384 / a.width);
  parallel_for((a.rows + block - 1) / block, threads, [&](int64_t task) {
    const int64_t last = std::min(a.rows, (task + 1) * block);
    for (int64_t r = task * block; r < last; ++r) {
      const T* row = x + r * 2 * a.width;
      for_columns(a.width, [&](int64_t c, int n) {
        const F32 gate = gelu<T>(load_columns(row + a.width + c, n));
        store_columns(out + r * a.width + c, load_columns(row + c, n) * gate, n);
      });
    }
  });
}

void geglu_cpu(const GegluArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { geglu<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
