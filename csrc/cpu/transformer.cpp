// A whole transformer of one block, + x, in tiles: everything that one pixel, or one row, needs is
// computed while it lies in L2, so that no intermediate result goes through memory.
//
// time:  a tile is a few pixels in all frames; nothing else is needed, one pass.
// space: a tile is a few rows; attention needs the keys and values of the whole frame, so a first
//        pass makes h and qkv of all rows, a second one does the rest.
#include "transformer.h"

#include <initializer_list>
#include <vector>

#include "cpu/attention.h"
#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"
#include "cpu/norm.h"

namespace vf::VF_ISA {

namespace {

constexpr int64_t kTileBytes = 512 * 1024;

template <class T>
class Worker {  // of one tile at a time, in memory of the thread
 public:
  Worker(const TransformerArgs& a, const std::vector<float>* bias, int64_t rows)
      : a_(a), bias_(bias) {
    const int64_t heads = a.heads * a.head_dim;
    const int64_t wide = std::max({a.channels, a.inner, heads});
    const int64_t parts[] = {a.channels, a.channels,
                             wide,       a.inner,
                             heads,      std::max(3 * heads, a.feed_forward.gate.columns)};
    int64_t width = 0;
    for (int64_t part : parts) width += (part * int64_t(sizeof(T)) + 63) / 64 * 64 / sizeof(T);
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < width * rows + 64) memory.resize(width * rows + 64);
    T* next = memory.data();
    T** places[] = {&x, &y, &normed, &h, &attended, &gates};
    for (int i = 0; i < 6; ++i) {
      *places[i] = next;
      next += (parts[i] * int64_t(sizeof(T)) + 63) / 64 * 64 / sizeof(T) * rows;
    }
    scratch_ = gemm_scratch<T>(rows, 0);
  }

  struct Read {
    const T* x;
    int64_t width;
  };

  // out = x weights + bias [+ residual]; with two reads, side by side.
  void product(const Linear& l, std::initializer_list<Read> reads, int64_t rows, const T* residual,
               T* out, Epilogue epilogue = Epilogue::none) {
    RowMatmulArgs m{};
    for (const Read& read : reads)
      m.sources.at[m.sources.count++] = {read.x, read.width, read.width, nullptr, 1, rows};
    m.weights = l.weights;
    m.bias = l.bias;
    m.residual = residual;
    m.out = out;
    m.rows = m.item_rows = rows;
    m.columns = m.residual_stride = m.out_stride = l.columns;
    m.epilogue = epilogue;
    m.dtype = a_.dtype;
    const typename Gemm<T>::Panels panels(l.columns, epilogue == Epilogue::geglu);
    Gemm<T>::multiply(m, {0, rows}, {0, panels.count}, scratch_);
  }

  void layer_norm(const LayerNormWeights& n, const T* from, int64_t rows) {
    layer_norm_rows(from, n.weight, n.bias, normed, rows, a_.inner, n.eps);
  }

  void group_norm(const T* from, int64_t image, int64_t rows, T* to) {
    const float* k = a_.coefficients + image * 3 * a_.channels;
    scale_rows<T, false>(from, {k, k + a_.channels, k + 2 * a_.channels}, to, rows, a_.channels,
                         a_.channels);
  }

  Head<T> head(int64_t stride) const {
    Head<T> h{};
    h.q_stride = stride;
    h.out_stride = a_.heads * a_.head_dim;
    h.head_dim = int(a_.head_dim);
    h.scale = a_.scale;
    return h;
  }

  // Among the frames of each pixel: qkv in `gates`, rows (frame, pixel of the tile).
  void attend_time(int attention, int64_t pixels) {
    const int n = int(a_.frames);
    const int64_t heads = a_.heads * a_.head_dim;
    Head<T> h = head(pixels * 3 * heads);
    h.out_stride = pixels * heads;
    h.q_len = h.k_len = n;
    h.bias_stride = bias_stride(n);
    const AttentionScope<T> scope;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t i = 0; i < a_.heads; ++i) {
        h.q = gates + pixel * 3 * heads + i * a_.head_dim;
        h.out = attended + pixel * heads + i * a_.head_dim;
        if (!bias_[attention].empty()) h.bias = bias_[attention].data() + i * n * bias_stride(n);
        set_keys(h, h.q + heads, h.q + 2 * heads, h.q_stride);
        attend_rows(h, 0, n);
      }
  }

  // `rows` queries to the keys and values of one frame, or of a context.
  void attend_space(const T* q, int64_t q_stride, const T* k, int64_t k_stride, int64_t k_len,
                    int64_t rows, T* out) {
    const int64_t heads = a_.heads * a_.head_dim;
    Head<T> h = head(q_stride);
    h.q_len = int(rows);
    h.k_len = int(k_len);
    const AttentionScope<T> scope;
    for (int64_t i = 0; i < a_.heads; ++i) {
      h.q = q + i * a_.head_dim;
      h.out = out + i * a_.head_dim;
      set_keys(h, k + i * a_.head_dim, k + heads + i * a_.head_dim, k_stride);
      attend_rows(h, 0, int(rows));
    }
  }

  // From h to out + x.
  void finish(T* from, const T* residual, int64_t rows, T* out) {
    const FeedForward& f = a_.feed_forward;
    if (f.gate.weights) {
      layer_norm(f.norm, from, rows);
      product(f.gate, {{normed, a_.inner}}, rows, nullptr, gates, Epilogue::geglu);
      if (!f.out.weights) {
        product(a_.proj_out, {{from, a_.inner}, {gates, f.gate.columns}}, rows, residual, out);
        return;
      }
      product(f.out, {{gates, f.gate.columns}}, rows, from, from);
    }
    product(a_.proj_out, {{from, a_.inner}}, rows, residual, out);
  }

  // Rows of the tile: what it is given, and what it becomes; both are the caller's to fill. gates:
  // q, k, v as well, which are over before the gates come.
  T *x, *y, *normed, *h, *attended, *gates;

 private:
  const TransformerArgs& a_;
  const std::vector<float>* bias_;
  Scratch<T> scratch_;
};

template <class T>
int64_t tile_rows(const TransformerArgs& a) {
  const int64_t heads = a.heads * a.head_dim;
  const int64_t width =
      2 * a.channels + 2 * a.inner + heads + std::max(3 * heads, a.feed_forward.gate.columns);
  constexpr int64_t kStep = std::max<int64_t>(Gemm<T>::kRowStep, 12);
  return std::clamp<int64_t>(kTileBytes / (width * int64_t(sizeof(T))) / kStep * kStep, 2 * kStep,
                             192);
}

template <class T>
void in_time(const TransformerArgs& a, int64_t threads) {
  const int64_t n = a.frames;
  std::vector<float> bias[2];
  for (int i = 0; i < a.attentions.count; ++i)
    if (const float* given = a.attentions.at[i].bias) {
      bias[i].resize(a.heads * n * bias_stride(n));
      for (int64_t head = 0; head < a.heads; ++head)
        transposed_bias<T>(given + head * n * n, int(n), int(n),
                           bias[i].data() + head * n * bias_stride(n));
    }
  // An even number of pixels, so that tiles of 6 and 4 rows fill them; the same share per thread.
  int64_t most = std::max<int64_t>(tile_rows<T>(a) / n, 1);
  if (n % 6 && most >= 6) most = most / 6 * 6;
  const int64_t blocks = (a.pixels + most - 1) / most;
  const auto* x = static_cast<const T*>(a.x);
  auto* out = static_cast<T*>(a.out);
  parallel_for(a.batch * blocks, threads, [&](int64_t task) {
    Worker<T> w(a, bias, most * n);
    const int64_t b = task / blocks, pixel = task % blocks * most;
    const int64_t pixels = std::min(most, a.pixels - pixel), rows = pixels * n;
    const auto at = [&](int64_t frame) {
      return ((b * n + frame) * a.pixels + pixel) * a.channels;
    };
    for (int64_t frame = 0; frame < n; ++frame) {
      T* to = w.x + frame * pixels * a.channels;
      std::memcpy(to, x + at(frame), pixels * a.channels * sizeof(T));
      w.group_norm(to, b * n + frame, pixels, w.y + frame * pixels * a.channels);
    }
    w.product(a.proj_in, {{w.y, a.channels}}, rows, nullptr, w.h);
    for (int i = 0; i < a.attentions.count; ++i) {
      const TransformerAttention& attention = a.attentions.at[i];
      w.layer_norm(attention.norm, w.h, rows);
      w.product(attention.proj_in, {{w.normed, a.inner}}, rows, nullptr, w.gates);
      w.attend_time(i, pixels);
      w.product(attention.proj_out, {{w.attended, a.heads * a.head_dim}}, rows, w.h, w.h);
    }
    w.finish(w.h, w.x, rows, w.y);
    for (int64_t frame = 0; frame < n; ++frame)
      std::memcpy(out + at(frame), w.y + frame * pixels * a.channels,
                  pixels * a.channels * sizeof(T));
  });
}

template <class T>
void in_space(const TransformerArgs& a, int64_t threads) {
  const int64_t images = a.batch * a.frames, heads = a.heads * a.head_dim;
  const int64_t most = std::min(tile_rows<T>(a), a.pixels);
  const int64_t blocks = (a.pixels + most - 1) / most;  // of a frame
  const auto* x = static_cast<const T*>(a.x);
  auto *h = static_cast<T*>(a.h), *qkv = static_cast<T*>(a.qkv), *out = static_cast<T*>(a.out);
  const TransformerAttention &self = a.attentions.at[0], &cross = a.attentions.at[1];
  const auto tiles = [&](const auto& body) {
    parallel_for(images * blocks, threads, [&](int64_t task) {
      Worker<T> w(a, nullptr, most);
      const int64_t image = task / blocks, first = task % blocks * most;
      body(w, image, image * a.pixels + first, std::min(most, a.pixels - first));
    });
  };
  tiles([&](Worker<T>& w, int64_t image, int64_t row, int64_t rows) {
    w.group_norm(x + row * a.channels, image, rows, w.y);
    w.product(a.proj_in, {{w.y, a.channels}}, rows, nullptr, h + row * a.inner);
    w.layer_norm(self.norm, h + row * a.inner, rows);
    w.product(self.proj_in, {{w.normed, a.inner}}, rows, nullptr, qkv + row * 3 * heads);
  });
  tiles([&](Worker<T>& w, int64_t image, int64_t row, int64_t rows) {
    T* mine = h + row * a.inner;
    const T* frame = qkv + image * a.pixels * 3 * heads;
    w.attend_space(qkv + row * 3 * heads, 3 * heads, frame + heads, 3 * heads, a.pixels, rows,
                   w.attended);
    w.product(self.proj_out, {{w.attended, heads}}, rows, mine, mine);
    if (a.attentions.count > 1) {
      const T* kv = static_cast<const T*>(cross.kv) + image / a.frames * cross.kv_len * 2 * heads;
      w.layer_norm(cross.norm, mine, rows);
      w.product(cross.proj_in, {{w.normed, a.inner}}, rows, nullptr, w.gates);
      w.attend_space(w.gates, heads, kv, 2 * heads, cross.kv_len, rows, w.attended);
      w.product(cross.proj_out, {{w.attended, heads}}, rows, mine, mine);
    }
    w.finish(mine, x + row * a.channels, rows, out + row * a.channels);
  });
}

}  // namespace

void transformer_cpu(const TransformerArgs& args, int64_t threads) {
  by_product_dtype(args.dtype, [&](auto kind) {
    using T = decltype(kind);
    args.time ? in_time<T>(args, threads) : in_space<T>(args, threads);
  });
}

}  // namespace vf::VF_ISA
