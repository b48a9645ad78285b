// out = epilogue(sum over the sources' taps of rows x weights + bias) + residual
//
// A task is a block of rows by all panels or, where there are few rows, by one. A thread gets
// neighbouring blocks, the same part of the rows in every product: what it reads is then mostly
// what it wrote itself, and cores that share no cache do not wait for each other's.
#include "row_matmul.h"

#include <stdexcept>
#include <string>

#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"

namespace vf::VF_ISA {

template <class T>
static void row_matmul(const RowMatmulArgs& a, int64_t threads) {
  const typename Gemm<T>::Panels panels(a.columns, a.epilogue == Epilogue::geglu);
  constexpr int64_t kStep = Gemm<T>::kRowStep;
  int64_t widest = 0, taps = 0;
  for (int i = 0; i < a.sources.count; ++i) {
    const RowSource& source = a.sources.at[i];
    widest = std::max(widest, source.width);
    taps += source.taps;
  }
  if (taps > kMaxTaps)
    throw std::invalid_argument("row_matmul: too many taps, " + std::to_string(taps));
  const int64_t most = Gemm<T>::block_rows(a);
  int64_t rows = std::min(a.rows, most), groups = panels.count;
  if (threads > 1 && (a.rows > most * threads || panels.count < 4 * threads)) {
    // the same number of blocks for every thread
    const int64_t shares = threads * ((a.rows + most * threads - 1) / (most * threads));
    rows = ((a.rows + shares - 1) / shares + kStep - 1) / kStep * kStep;
    if (shares >= 4 * threads)
      groups = 1;
    else
      rows = std::min(std::max(a.rows * panels.count / (4 * threads) / kStep * kStep, 2 * kStep),
                      rows);
  }
  const int64_t blocks = (a.rows + rows - 1) / rows;
  parallel_for(blocks * groups, threads, [&](int64_t task) {
    const int64_t row = task / groups * rows, group = task % groups;
    const Range part{group * panels.count / groups, (group + 1) * panels.count / groups};
    Gemm<T>::multiply(a, {row, std::min(a.rows, row + rows)}, part, gemm_scratch<T>(rows, widest));
  });
}

void row_matmul_cpu(const RowMatmulArgs& args, int64_t threads) {
  by_product_dtype(args.dtype, [&](auto kind) { row_matmul<decltype(kind)>(args, threads); });
}

int64_t packed_words(int64_t columns, int64_t depth, bool geglu, DType dtype) {
  int64_t words = 0;
  by_product_dtype(dtype, [&](auto kind) {
    using Form = Gemm<decltype(kind)>;
    words = Form::packed_words(typename Form::Panels(columns, geglu), depth);
  });
  return words;
}

void pack_weights_cpu(const PackWeightsArgs& args, int64_t) {
  by_product_dtype(args.dtype, [&](auto kind) { Gemm<decltype(kind)>::pack(args); });
}

}  // namespace vf::VF_ISA
