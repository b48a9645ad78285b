// The kernels of networks (network.h) in the Python module: addresses, sizes and strides as
// integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "network.h"

namespace py = pybind11;

VF_CPU_DECLARE(void group_norm_silu_cpu(const vf::GroupNormArgs& args, int64_t threads))
VF_CPU_DECLARE(void layer_norm_cpu(const vf::LayerNormArgs& args, int64_t threads))
VF_CPU_DECLARE(void geglu_cpu(const vf::GegluArgs& args, int64_t threads))
VF_CPU_DECLARE(void spatial_attention_cpu(const vf::RowSpatialAttentionArgs& args, int64_t threads))
VF_CPU_DECLARE(void temporal_attention_cpu(const vf::RowTemporalAttentionArgs& args,
                                           int64_t threads))
VF_CPU_DECLARE(void row_matmul_cpu(const vf::RowMatmulArgs& args, int64_t threads))
VF_CPU_DECLARE(void transformer_cpu(const vf::TransformerArgs& args, int64_t threads))
VF_CPU_DECLARE(void winograd_cpu(const vf::WinogradArgs& args, int64_t threads))
VF_CPU_DECLARE(int64_t packed_words(int64_t columns, int64_t depth, bool geglu, vf::DType dtype))
VF_CPU_DECLARE(void pack_weights(const vf::PackArgs& args))

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

template <class T = void>
const T* from(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void* to(uintptr_t address) { return reinterpret_cast<void*>(address); }

vf::DType dtype_of(int dtype) { return static_cast<vf::DType>(dtype); }

float default_scale(int64_t head_dim) { return float(1.0 / std::sqrt(double(head_dim))); }

// (address, row stride, width, table address, taps, rows of an item)
using Source = std::array<int64_t, 6>;

void row_matmul(const std::vector<Source>& sources, uintptr_t weights, uintptr_t bias,
                int64_t bias_rows, int64_t bias_stride, uintptr_t residual, int64_t residual_stride,
                uintptr_t out, int64_t out_stride, int64_t rows, int64_t item_rows, int64_t columns,
                int epilogue, int dtype, bool out_f32, uintptr_t out_table, int64_t item_rows_out,
                int64_t threads) {
  if (sources.empty() || sources.size() > vf::kMaxSources)
    throw std::invalid_argument("row_matmul: expected 1 to 3 sources");
  vf::RowMatmulArgs args{};
  int64_t taps = 0;
  for (const Source& s : sources) {
    vf::RowSource& source = args.sources[args.num_sources++];
    source = {from(s[0]), s[1], s[2], from<int32_t>(s[3]), s[4], s[5]};
    taps += s[4];
  }
  if (taps > vf::kMaxTaps) throw std::invalid_argument("row_matmul: too many taps");
  args.weights = from(weights);
  args.bias = from<float>(bias);
  args.bias_rows = bias_rows;
  args.bias_stride = bias_stride;
  args.residual = from(residual);
  args.residual_stride = residual_stride;
  args.out = to(out);
  args.out_stride = out_stride;
  args.rows = rows;
  args.item_rows = item_rows;
  args.columns = columns;
  args.out_table = from<int32_t>(out_table);
  args.item_rows_out = item_rows_out;
  args.epilogue = static_cast<vf::Epilogue>(epilogue);
  args.dtype = dtype_of(dtype);
  args.out_f32 = out_f32;
  const py::gil_scoped_release release;
  VF_CPU_CALL(row_matmul_cpu, args, threads);
}

void group_norm_silu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale,
                     uintptr_t shift, uintptr_t residual, uintptr_t out, int64_t images,
                     int64_t rows, int64_t channels, int64_t groups, int64_t num_frames, float eps,
                     bool silu, int dtype, int64_t threads, uintptr_t x2, int64_t channels2,
                     int64_t modulation_stride, uintptr_t coefficients) {
  vf::GroupNormArgs args{};
  args.x = from(x);
  args.x2 = from(x2);
  args.residual = from(residual);
  args.weight = from<float>(weight);
  args.bias = from<float>(bias);
  args.scale = from<float>(scale);
  args.shift = from<float>(shift);
  args.out = to(out);
  args.images = images;
  args.rows = rows;
  args.channels = channels;
  args.channels2 = channels2;
  args.groups = groups;
  args.num_frames = num_frames;
  args.modulation_stride = modulation_stride ? modulation_stride : channels + channels2;
  args.coefficients = reinterpret_cast<float*>(coefficients);
  args.eps = eps;
  args.silu = silu;
  args.dtype = dtype_of(dtype);
  VF_CPU_CALL(group_norm_silu_cpu, args, threads);
}

void layer_norm(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows,
                int64_t channels, float eps, int dtype, int64_t threads) {
  const vf::LayerNormArgs args{
      from(x), from<float>(weight), from<float>(bias), to(out), rows, channels,
      eps,     dtype_of(dtype)};
  VF_CPU_CALL(layer_norm_cpu, args, threads);
}

void geglu(uintptr_t x, uintptr_t out, int64_t rows, int64_t width, int dtype, int64_t threads) {
  const vf::GegluArgs args{from(x), to(out), rows, width, dtype_of(dtype)};
  VF_CPU_CALL(geglu_cpu, args, threads);
}

// scale 0: 1 / sqrt(head_dim)
void spatial_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t frames,
                       int64_t q_len, int64_t k_len, int64_t heads, int64_t head_dim,
                       int64_t q_stride, int64_t kv_stride, int64_t kv_frames, int dtype,
                       int64_t threads, float scale) {
  const vf::RowSpatialAttentionArgs args{
      from(q),        from(k),
      from(v),        to(out),
      frames,         q_len,
      k_len,          heads,
      head_dim,       q_stride,
      kv_stride,      heads * head_dim,
      kv_frames,      scale > 0 ? scale : default_scale(head_dim),
      dtype_of(dtype)};
  VF_CPU_CALL(spatial_attention_cpu, args, threads);
}

void temporal_attention(uintptr_t qkv, uintptr_t bias, uintptr_t out, int64_t batch, int64_t frames,
                        int64_t pixels, int64_t heads, int64_t head_dim, int dtype, int64_t threads,
                        float scale) {
  const vf::RowTemporalAttentionArgs args{from(qkv),
                                          from<float>(bias),
                                          to(out),
                                          batch,
                                          frames,
                                          pixels,
                                          heads,
                                          head_dim,
                                          scale > 0 ? scale : default_scale(head_dim),
                                          dtype_of(dtype)};
  VF_CPU_CALL(temporal_attention_cpu, args, threads);
}

// (weights, bias, columns, depth), (weight, bias, eps), (norm, in, out, kv,
// kv_len, bias)
using Linear = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;
using Norm = std::tuple<uintptr_t, uintptr_t, float>;
using Attention = std::tuple<Norm, Linear, Linear, uintptr_t, int64_t, uintptr_t>;

vf::RowLinear linear(const Linear& l) {
  const auto& [weights, bias, columns, depth] = l;
  return {from(weights), from<float>(bias), columns, depth};
}

vf::RowLayerNorm norm(const Norm& n) {
  const auto& [weight, bias, eps] = n;
  return {from<float>(weight), from<float>(bias), eps};
}

// shape: (batch, frames, pixels, channels, inner, heads, head_dim); feed_forward: nothing, or
// (norm, gate, gate_out) where a gate_out without weights is multiplied into proj_out
void transformer(const std::array<int64_t, 7>& shape, bool time, float scale, uintptr_t x,
                 uintptr_t coefficients, uintptr_t h, uintptr_t qkv, uintptr_t out,
                 const Linear& proj_in, const std::vector<Attention>& attentions,
                 const std::vector<std::tuple<Norm, Linear, Linear>>& feed_forward,
                 const Linear& proj_out, int dtype, int64_t threads) {
  if (attentions.empty() || attentions.size() > 2 || feed_forward.size() > 1)
    throw std::invalid_argument("transformer: expected 1 or 2 attentions, 0 or 1 feed-forward");
  vf::TransformerArgs args{};
  args.x = from(x);
  args.coefficients = from<float>(coefficients);
  args.h = to(h);
  args.qkv = to(qkv);
  args.out = to(out);
  args.batch = shape[0];
  args.frames = shape[1];
  args.pixels = shape[2];
  args.channels = shape[3];
  args.inner = shape[4];
  args.heads = shape[5];
  args.head_dim = shape[6];
  args.scale = scale;
  args.time = time;
  args.proj_in = linear(proj_in);
  args.proj_out = linear(proj_out);
  for (const auto& [n, in, o, kv, kv_len, bias] : attentions)
    args.attentions[args.num_attentions++] = {norm(n),  linear(in), linear(o),
                                              from(kv), kv_len,     from<float>(bias)};
  for (const auto& [n, gate, gate_out] : feed_forward) {
    args.norm = norm(n);
    args.gate = linear(gate);
    args.gate_out = linear(gate_out);
    args.gated = true;
    args.joined = args.gate_out.weights == nullptr;
  }
  args.dtype = dtype_of(dtype);
  const py::gil_scoped_release release;
  VF_CPU_CALL(transformer_cpu, args, threads);
}

void winograd(uintptr_t x, uintptr_t weights, uintptr_t bias, int64_t bias_rows,
              int64_t bias_stride, uintptr_t residual, uintptr_t out, int64_t items, int64_t height,
              int64_t width, int64_t channels, int64_t columns, bool flat, int dtype,
              int64_t threads) {
  const vf::WinogradArgs args{from(x),     from(weights),  from<float>(bias), bias_rows,
                              bias_stride, from(residual), to(out),           items,
                              height,      width,          channels,          columns,
                              flat,        dtype_of(dtype)};
  VF_CPU_CALL(winograd_cpu, args, threads);
}

int64_t packed_words(int64_t columns, int64_t depth, bool geglu, int dtype) {
  return VF_CPU_CALL(packed_words, columns, depth, geglu, dtype_of(dtype));
}

void pack_weights(uintptr_t weights, uintptr_t out, int64_t columns, int64_t depth, bool geglu,
                  int dtype) {
  const vf::PackArgs args{from(weights), to(out), columns, depth, geglu, dtype_of(dtype)};
  VF_CPU_CALL(pack_weights, args);
}

}  // namespace

void define_network(py::module_& m) {
  m.def("group_norm_silu_cpu", &group_norm_silu, Release(), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("out"),
        py::arg("images"), py::arg("rows"), py::arg("channels"), py::arg("groups"),
        py::arg("num_frames"), py::arg("eps"), py::arg("silu"), py::arg("dtype"),
        py::arg("threads"), py::arg("x2") = 0, py::arg("channels2") = 0,
        py::arg("modulation_stride") = 0, py::arg("coefficients") = 0);
  m.def("layer_norm_cpu", &layer_norm, Release());
  m.def("geglu_cpu", &geglu, Release());
  m.def("spatial_attention_cpu", &spatial_attention, Release(), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("out"), py::arg("frames"), py::arg("q_len"), py::arg("k_len"),
        py::arg("heads"), py::arg("head_dim"), py::arg("q_stride"), py::arg("kv_stride"),
        py::arg("kv_frames"), py::arg("dtype"), py::arg("threads"), py::arg("scale") = 0.0f);
  m.def("temporal_attention_cpu", &temporal_attention, Release(), py::arg("qkv"), py::arg("bias"),
        py::arg("out"), py::arg("batch"), py::arg("frames"), py::arg("pixels"), py::arg("heads"),
        py::arg("head_dim"), py::arg("dtype"), py::arg("threads"), py::arg("scale") = 0.0f);
  m.def("row_matmul_cpu", &row_matmul);
  m.def("transformer_cpu", &transformer);
  m.def("winograd_cpu", &winograd, Release());
  m.def("packed_words", &packed_words);
  m.def("pack_weights", &pack_weights, Release());
}
