// row_matmul: products of rows, with what comes before and after them (network.h, cpu/matmul.h).
//
// A task is a block of rows by all panels or, where there are few rows, by one. A thread gets
// neighbouring blocks, the same part of the rows in every product: what it reads is then mostly
// what it wrote itself, and cores that share no cache do not wait for each other's.
#include <vector>

#include "cpu/matmul.h"
#include "cpu/parallel.h"

namespace vf::VF_ISA {

template <class T>
static void row_matmul(const RowMatmulArgs& a, int64_t threads) {
  const Panels panels(a.columns, a.epilogue == Epilogue::geglu);
  int64_t bytes = 0, widest = 0;
  for (int i = 0; i < a.num_sources; ++i) {
    bytes += a.sources[i].width * sizeof(T);
    widest = std::max(widest, a.sources[i].width);
  }
  const int64_t most = std::clamp<int64_t>(128 * 1024 / bytes, 48, 384);  // rows that stay in L2
  int64_t rows = std::min(a.rows, most), groups = panels.count;
  if (threads > 1 && (a.rows > most * threads || panels.count < 4 * threads)) {
    // the same number of blocks for every thread
    const int64_t shares = threads * ((a.rows + most * threads - 1) / (most * threads));
    rows = ((a.rows + shares - 1) / shares + 5) / 6 * 6;
    if (shares >= 4 * threads)
      groups = 1;
    else
      rows = std::min(std::max<int64_t>(a.rows * panels.count / (4 * threads) / 6 * 6, 12), rows);
  }
  const int64_t blocks = (a.rows + rows - 1) / rows;
  parallel_for(blocks * groups, threads, [&](int64_t task) {
    static thread_local std::vector<float> sums;
    static thread_local std::vector<T> zeros;  // never written to
    if (int64_t(sums.size()) < rows * kPanel * kLanes) sums.resize(rows * kPanel * kLanes);
    if (int64_t(zeros.size()) < widest) zeros.assign(widest, T{});
    const int64_t row = task / groups * rows, group = task % groups;
    block<T>(a, row, std::min(a.rows, row + rows), group * panels.count / groups,
             (group + 1) * panels.count / groups, sums.data(), zeros.data());
  });
}

void row_matmul_cpu(const RowMatmulArgs& args, int64_t threads) {
  args.dtype == DType::bf16 ? row_matmul<BFloat16>(args, threads)
                            : row_matmul<float>(args, threads);
}

int64_t packed_words(int64_t columns, int64_t depth, bool geglu, DType dtype) {
  return Panels(columns, geglu).words(depth / (dtype == DType::bf16 ? 2 : 1));
}

void pack_weights(const PackArgs& args) {
  args.dtype == DType::bf16 ? pack<BFloat16>(args) : pack<float>(args);
}

}  // namespace vf::VF_ISA
