// Products of rows with packed weights, whatever instructions compute them.
//
// A form is a class of static functions for rows of T, in a file of its own: vector.h has that of
// vector instructions, tile.h that of a matrix unit. Gemm chooses.
//
//   Panels(columns, geglu)        how the columns of a product are dealt to panels, `count` of
//   them:
//                                 first(panel), vectors(panel): its first vector, and how many
//   kColumns                      of the widest panel
//   kRowStep                      rows that are multiplied together
//   block_rows(args)              rows that are best multiplied in one call
//   packed_words(panels, depth)   32-bit words of the weights
//   pack(args)                    puts the weights into this form's order
//   multiply(args, rows, panels, scratch)
//                                 a range of the rows by a range of the panels, epilogue and all
//
// Winograd's form needs products without an epilogue as well, PanelSums, which VectorGemm has.
#pragma once
#include <type_traits>

#include "cpu/gemm/tile.h"
#include "cpu/gemm/vector.h"

namespace vf::VF_ISA {

#if VF_TILES
template <class T>
using Gemm = std::conditional_t<kInTiles<T>, TileGemm, VectorGemm<T>>;
#else
template <class T>
using Gemm = VectorGemm<T>;
#endif

// Calls run(T()) with the type of a product's rows.
template <class Run>
static inline void by_product_dtype(DType dtype, const Run& run) {
  dtype == DType::bf16 ? run(BFloat16()) : run(float());
}

// The thread's own, for so many rows; `widest`: of the sources, in numbers, where padding is read.
template <class T>
static inline Scratch<T> gemm_scratch(int64_t rows, int64_t widest) {
  static thread_local std::vector<float> sums;
  static thread_local std::vector<T> zeros;  // never written to
  if (int64_t(sums.size()) < rows * Gemm<T>::kColumns) sums.resize(rows * Gemm<T>::kColumns);
  if (int64_t(zeros.size()) < widest) zeros.assign(widest, T{});
  return {sums.data(), zeros.data()};
}

}  // namespace vf::VF_ISA
