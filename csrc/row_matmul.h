// out = epilogue(sum over the sources' taps of rows x weights + bias) + residual
//
// Row m = (item, j) of the output reads, for tap t of a source, its row (item, table[t, j]), or
// zeros where the table says -1; without a table there is one tap, and its row is m. So one product
// is a linear layer, a convolution of any kind, one over nearest-upsampled rows, or several at
// once. Rows in fp32 or bf16, sums in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

// width: of a row, in numbers, a multiple of what a word holds; stride: from row to row;
// table: [taps, item_rows of the result]; item_rows: rows of an item here.
#define VF_ROW_SOURCE_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                       \
  FIELD(int64_t, stride)                      \
  FIELD(int64_t, width)                       \
  OPTIONAL(const int32_t*, table)             \
  FIELD(int64_t, taps)                        \
  FIELD(int64_t, item_rows)
VF_ARGS(RowSource, VF_ROW_SOURCE_FIELDS);

// geglu: values times gelu(gates); gelu: x Φ(x); quick_gelu: x / (1 + e^(-1.702 x)), of CLIP.
enum class Epilogue : int { none = 0, geglu = 1, gelu = 2, quick_gelu = 3 };

constexpr int kMaxSources = 3;
constexpr int kMaxTaps = 64;  // of all sources
using RowSources = List<RowSource, kMaxSources>;

// weights: of pack_weights; bias: [items of bias_rows rows, bias_stride], or one for all where
// bias_rows = 0; columns: of out; out_table: [item_rows], which of the item_rows_out rows of its
// item in out each row becomes, or null, as they come; out_f32: out in fp32 whatever the dtype.
#define VF_ROW_MATMUL_FIELDS(FIELD, OPTIONAL) \
  FIELD(RowSources, sources)                  \
  FIELD(const void*, weights)                 \
  OPTIONAL(const float*, bias)                \
  OPTIONAL(int64_t, bias_rows)                \
  OPTIONAL(int64_t, bias_stride)              \
  OPTIONAL(const void*, residual)             \
  OPTIONAL(int64_t, residual_stride)          \
  FIELD(void*, out)                           \
  FIELD(int64_t, out_stride)                  \
  FIELD(int64_t, rows)                        \
  FIELD(int64_t, item_rows)                   \
  FIELD(int64_t, columns)                     \
  OPTIONAL(const int32_t*, out_table)         \
  OPTIONAL(int64_t, item_rows_out)            \
  OPTIONAL(Epilogue, epilogue)                \
  OPTIONAL(bool, out_f32)                     \
  FIELD(DType, dtype)
VF_ARGS(RowMatmulArgs, VF_ROW_MATMUL_FIELDS);

// weights [columns, depth] row-major (with geglu twice the columns: values, then gates) into the
// order that the products of this instruction set read: packed_words(...) words.
#define VF_PACK_WEIGHTS_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, weights)                   \
  FIELD(void*, out)                             \
  FIELD(int64_t, columns)                       \
  FIELD(int64_t, depth)                         \
  FIELD(bool, geglu)                            \
  FIELD(DType, dtype)
VF_ARGS(PackWeightsArgs, VF_PACK_WEIGHTS_FIELDS);

}  // namespace vf
