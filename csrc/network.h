// What the CPU kernels of networks take (vfengine/ops, vfengine/plan/program.py): rows of one
// dtype, statistics and parameters of norms in fp32. A null pointer is an absent one. Products and
// whole transformers take fp32 and bf16, the others fp16 as well.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace vf {

// y = silu(norm(x) w + b), with scale and shift norm(x) w (1 + scale) + b (1 + scale) + shift; then
// + residual. x: [images, rows, channels], of two halves side by side where x2 is given; statistics
// per group of channels over the rows of num_frames neighbouring images.
//
// With `coefficients`, [images, 3, channels] in fp32, each channel's (cpu/norm.h) are written
// there, and nothing else.
struct GroupNormArgs {
  const void *x, *x2, *residual;
  const float *weight, *bias;
  const float *scale, *shift;  // [images, channels], rows of modulation_stride
  void* out;
  int64_t images, rows, channels, channels2, groups, num_frames, modulation_stride;
  float eps;
  bool silu;
  DType dtype;
  float* coefficients;
};

// y = norm(x) w + b of each row [channels].
struct LayerNormArgs {
  const void* x;
  const float *weight, *bias;
  void* out;
  int64_t rows, channels;
  float eps;
  DType dtype;
};

// y = x[:, :width] gelu(x[:, width:]).
struct GegluArgs {
  const void* x;
  void* out;
  int64_t rows, width;
  DType dtype;
};

// softmax(q k^T / sqrt(head_dim) + bias) v per frame and head. q: [frames, q_len, heads, head_dim],
// k, v: [kv_frames, k_len, heads, head_dim], kv_frames dividing frames; strides are those of rows,
// in numbers.
struct RowSpatialAttentionArgs {
  const void *q, *k, *v;
  void* out;
  int64_t frames, q_len, k_len, heads, head_dim, q_stride, kv_stride, out_stride, kv_frames;
  float scale;
  DType dtype;
};

// The same among the frames of each pixel. qkv: [batch, frames, pixels, 3, heads, head_dim],
// bias: [heads, frames, frames].
struct RowTemporalAttentionArgs {
  const void* qkv;
  const float* bias;
  void* out;
  int64_t batch, frames, pixels, heads, head_dim;
  float scale;
  DType dtype;
};

// out = epilogue(sum over the sources' taps of rows x weights + bias) + residual.
//
// Row m = (item, j) of the output reads, for tap t of a source, its row (item, table[t, j]), or
// zeros where the table says -1; without a table there is one tap, and its row is m. So one product
// is a linear layer, a convolution of any kind, one over nearest-upsampled rows, or several at
// once.
struct RowSource {
  const void* x;
  int64_t stride, width;       // of a row, in numbers; width a multiple of what a word holds
  const int32_t* table;        // [taps, item_rows]
  int64_t taps, item_rows_in;  // rows of an item here
};

enum class Epilogue : int { none = 0, geglu = 1 };

constexpr int kMaxSources = 3;
constexpr int kMaxTaps = 64;  // of all sources

struct RowMatmulArgs {
  RowSource sources[kMaxSources];
  int num_sources;
  const void* weights;  // of pack_weights
  const float* bias;  // [items of bias_rows rows, bias_stride], or one for all where bias_rows = 0
  int64_t bias_rows, bias_stride;
  const void* residual;
  void* out;
  int64_t rows, item_rows, columns;  // columns of out
  int64_t residual_stride, out_stride;
  const int32_t* out_table;  // [item_rows]: which row of its item in out; or null, as they come
  int64_t item_rows_out;
  Epilogue epilogue;
  DType dtype;
  bool out_f32;
};

// A convolution of 3 (temporal, 1-D) or 3x3 taps with padding 1 and stride 1 in Winograd's form
// F(2, 3) (Lavin and Gray 2016, arXiv 1509.09308): 4 products for 2 results, or 16 for 4, in place
// of 6 and 36. x, residual and out: [items, height, width, channels or columns]; 1-D runs along
// height.
struct WinogradArgs {
  const void* x;
  const void* weights;  // 4 or 16 of pack_weights, one after another: transformed taps
  const float* bias;    // as in RowMatmulArgs
  int64_t bias_rows, bias_stride;
  const void* residual;
  void* out;
  int64_t items, height, width, channels, columns;
  bool flat;  // 1-D
  DType dtype;
};

// A whole transformer of one block, in tiles of rows that stay in L2: group norm (as coefficients),
// proj_in, one or two attentions, a gated feed-forward layer, proj_out, + x. All products' weights
// are packed; `joined`: the feed-forward layer's last one is multiplied into proj_out.
struct RowLinear {
  const void* weights;
  const float* bias;
  int64_t columns, depth;  // of the result, of a row that it takes
};

struct RowLayerNorm {
  const float *weight, *bias;
  float eps;
};

struct TransformerAttention {
  RowLayerNorm norm;
  RowLinear in, out;  // q, k, v; or q alone where there is a context
  const void* kv;     // of the context [batch, kv_len, 2, heads, head_dim], or null
  int64_t kv_len;
  const float* bias;  // [heads, frames, frames] or null
};

struct TransformerArgs {
  const void* x;
  const float* coefficients;
  void *h, *qkv, *out;  // h, qkv: room for all rows, for attention in space alone
  int64_t batch, frames, pixels, channels, inner, heads, head_dim;
  float scale;
  bool time;  // attention among the frames of a pixel; else among the pixels of a frame
  RowLinear proj_in, proj_out;
  TransformerAttention attentions[2];
  int num_attentions;
  RowLayerNorm norm;
  RowLinear gate, gate_out;
  bool gated, joined;
  DType dtype;
};

// weights [columns, depth] row-major (with geglu twice the columns: values, then gates) into the
// order that the products of this instruction set read. Words of out: packed_words(...).
struct PackArgs {
  const void* weights;
  void* out;
  int64_t columns, depth;
  bool geglu;
  DType dtype;
};

}  // namespace vf
