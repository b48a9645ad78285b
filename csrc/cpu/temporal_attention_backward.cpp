// The gradients of temporal attention: see temporal_attention_backward.h.
//
// A task is a few pixels, of each of which it takes one head after the other in fp32. Probabilities
// and S lie turned, [keys, queries], so that the softmax needs no shuffles; all five products are
// sums of broadcast numbers times vectors. What pixels add to grad_bias is summed per task.
#include "temporal_attention_backward.h"

#include "cpu/attention.h"
#include "cpu/base/parallel.h"
#include "cpu/partial_sums.h"

namespace vf::VF_ISA {

namespace {

// A matrix of fp32 by the distances of its rows and of the numbers in a row.
struct Factor {
  const float* at;
  int64_t row, step;
};

// store(row, column, sum) of R rows and V vectors of columns: the sums over s of a[row, s] b[s, :].
template <int R, int V, class Store>
VF_INLINE void product_block(Factor a, const float* b, int64_t b_row, int steps,
                             const Store& store) {
  F32 sum[R][V] = {};
  for (int s = 0; s < steps; ++s) {
    F32 y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = load<F32>(b + s * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(a.at[r * a.row + s * a.step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(r, v * kLanes, sum[r][v]);
}

template <int R, int V, class Store>
VF_INLINE int product_rows(int row, int rows, Factor a, const float* b, int64_t b_row, int steps,
                           const Store& store) {
  for (; row + R <= rows; row += R)
    product_block<R, V>({a.at + row * a.row, a.row, a.step}, b, b_row, steps,
                        [&](int r, int c, F32 x) { store(row + r, c, x); });
  return row;
}

// The same for all rows and all columns, which b is filled up to whole vectors of.
template <class Store>
static inline void product(int rows, int columns, Factor a, const float* b, int64_t b_row,
                           int steps, const Store& store) {
  int c = 0;
  const auto next = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value, R = V == 1 ? kUnroll : kUnroll / 2;
    for (; c + V * kLanes <= round_up(columns, kLanes); c += V * kLanes) {
      const auto shifted = [&](int r, int at, F32 x) { store(r, c + at, x); };
      const int row = product_rows<R, V>(0, rows, a, b + c, b_row, steps, shifted);
      product_rows<1, V>(row, rows, a, b + c, b_row, steps, shifted);
    }
  };
#if defined(__AVX512F__)
  next(std::integral_constant<int, 4>());
#endif
  next(std::integral_constant<int, 2>());
  next(std::integral_constant<int, 1>());
}

// What a thread holds of one head of one pixel: rows [frames, depth], filled up with zeros to whole
// vectors, and those that lie in the lanes, [depth, queries].
struct HeadMemory {
  std::vector<float> numbers;
  float *q, *k, *v, *grad, *q_turned, *grad_turned, *probability, *score;

  void make(int64_t frames, int64_t depth, int64_t queries) {
    float** const of_rows[] = {&q, &k, &v, &grad};
    float** const turned[] = {&q_turned, &grad_turned};
    float** const of_keys[] = {&probability, &score};
    const int64_t size = 4 * frames * depth + 2 * depth * queries + 2 * frames * queries;
    if (int64_t(numbers.size()) < size) numbers.resize(size);
    float* next = numbers.data();
    const auto deal = [&](float** to, int64_t count) { *to = next, next += count; };
    for (float** to : of_rows) deal(to, frames * depth);
    for (float** to : turned) deal(to, depth * queries);
    for (float** to : of_keys) deal(to, frames * queries);
  }
};

template <class T>
class TemporalBackward {
 public:
  explicit TemporalBackward(const TemporalAttentionBackwardArgs& a)
      : a_(a),
        frames_(int(a.frames)),
        head_dim_(int(a.head_dim)),
        depth_(round_up(head_dim_, kLanes)),
        queries_(round_up(frames_, kLanes)),
        channels_(a.heads * a.head_dim),
        scale_(logit_scale(0, a.head_dim)),
        pixels_(a.batch * a.pixels) {
    task_pixels_ = 8;
    if (!a.bias) return;
    task_pixels_ = std::max<int64_t>(task_pixels_, (pixels_ + kMostTasks - 1) / kMostTasks);
    bias_.resize(a.heads * frames_ * bias_stride(frames_));
    for (int64_t head = 0; head < a.heads; ++head)
      transposed_bias<float>(a.bias + head * frames_ * frames_, frames_, frames_,
                             bias_.data() + head * frames_ * bias_stride(frames_));
  }

  void run(int64_t threads) {
    const int64_t tasks = (pixels_ + task_pixels_ - 1) / task_pixels_;
    const int64_t size = a_.heads * frames_ * queries_;  // of [heads, keys, queries]
    if (a_.bias) partial_.resize(tasks * size);
    parallel_for(tasks, threads, [&](int64_t task) {
      static thread_local HeadMemory memory;
      memory.make(frames_, depth_, queries_);
      const int64_t last = std::min(pixels_, (task + 1) * task_pixels_);
      for (int64_t pixel = task * task_pixels_; pixel < last; ++pixel)
        for (int64_t head = 0; head < a_.heads; ++head)
          backward(pixel, head, memory,
                   a_.bias ? partial_.data() + task * size + head * frames_ * queries_ : nullptr);
    });
    if (!a_.bias) return;
    std::vector<float> sums(size);
    sum_partial(partial_.data(), tasks, size, sums.data(), threads);
    for (int64_t head = 0; head < a_.heads; ++head)
      for (int query = 0; query < frames_; ++query)
        for (int key = 0; key < frames_; ++key)
          a_.grad_bias[(head * frames_ + query) * frames_ + key] =
              sums[(head * frames_ + key) * queries_ + query];
  }

 private:
  static constexpr int64_t kMostTasks = 128;  // that keep a grad_bias each

  // rows [frames, head_dim], `stride` apart, in fp32.
  void widen_rows(const T* from, int64_t stride, float* to) const {
    for (int frame = 0; frame < frames_; ++frame)
      for_columns(head_dim_, [&](int64_t c, int n) {
        store(to + frame * depth_ + c, load_columns(from + frame * stride + c, n));
      });
  }

  // [frames, depth] -> [depth, queries].
  void turn(const float* rows, float* out) const {
    U32 column[kMaxHeadDim];
    for (int first = 0; first < frames_; first += kLanes) {
      const int count = std::min(frames_ - first, kLanes);
      load_columns_of_words(reinterpret_cast<const char*>(rows + first * depth_), depth_ * 4, count,
                            head_dim_, column);
      for (int d = 0; d < head_dim_; ++d) store(out + d * queries_ + first, column[d]);
    }
  }

  // softmax over the keys, from scores [keys, queries]; in fp32 for all dtypes, as grad_bias is.
  void softmax(const float* bias, float* p) const {
    const float factor = scale_ * kExponent<float>;
    for (int i = 0; i < queries_; i += kLanes) {
      F32 top = splat(-1e30f), total = {};
      for (int key = 0; key < frames_; ++key) {
        float* at = p + key * queries_ + i;
        F32 logit = load<F32>(at) * factor;
        if (bias) logit += load<F32>(bias + key * bias_stride(frames_) + i);
        store(at, logit);
        top = maximum(top, logit);
      }
      for (int key = 0; key < frames_; ++key) {
        float* at = p + key * queries_ + i;
        const F32 e = exponential<float>(load<F32>(at) - top);
        total += e;
        store(at, e);
      }
      const F32 inverse = 1.0f / total;
      for (int key = 0; key < frames_; ++key) {
        float* at = p + key * queries_ + i;
        store(at, load<F32>(at) * inverse);
      }
    }
  }

  // S in place of grad v^T; added to what grad_bias is the sum of.
  void gradient_of_logits(const float* p, float* s, float* bias_sum) const {
    for (int i = 0; i < queries_; i += kLanes) {
      F32 mean = {};
      for (int at = i; at < frames_ * queries_; at += queries_)
        mean += load<F32>(p + at) * load<F32>(s + at);
      for (int at = i; at < frames_ * queries_; at += queries_) {
        const F32 logit = load<F32>(p + at) * (load<F32>(s + at) - mean);
        store(s + at, logit);
        if (bias_sum) store(bias_sum + at, load<F32>(bias_sum + at) + logit);
      }
    }
  }

  void backward(int64_t pixel, int64_t head, HeadMemory& m, float* bias_sum) const {
    const int64_t row = pixel / a_.pixels * frames_ * a_.pixels + pixel % a_.pixels;
    const int64_t stride = a_.pixels * channels_, column = head * a_.head_dim;
    const T* qkv = static_cast<const T*>(a_.qkv) + row * 3 * channels_ + column;
    T* out = static_cast<T*>(a_.out) + row * 3 * channels_ + column;
    float* const rows[] = {m.q, m.k, m.v};
    for (int i = 0; i < 3; ++i) widen_rows(qkv + i * channels_, 3 * stride, rows[i]);
    widen_rows(static_cast<const T*>(a_.grad) + row * channels_ + column, stride, m.grad);
    turn(m.q, m.q_turned);
    turn(m.grad, m.grad_turned);

    const auto keep = [&](float* to) {
      return [=](int key, int query, F32 x) { store(to + key * queries_ + query, x); };
    };
    product(frames_, frames_, {m.k, depth_, 1}, m.q_turned, queries_, head_dim_,
            keep(m.probability));
    product(frames_, frames_, {m.v, depth_, 1}, m.grad_turned, queries_, head_dim_, keep(m.score));
    softmax(a_.bias ? bias_.data() + head * frames_ * bias_stride(frames_) : nullptr,
            m.probability);
    gradient_of_logits(m.probability, m.score, bias_sum);

    const auto write = [&](T* to, float factor) {
      return [=](int frame, int c, F32 x) {
        store_columns(to + frame * 3 * stride + c, x * factor, columns_left(head_dim_, c));
      };
    };
    const Factor turned{m.score, 1, queries_}, s{m.score, queries_, 1};
    product(frames_, head_dim_, turned, m.k, depth_, frames_, write(out, scale_));
    product(frames_, head_dim_, s, m.q, depth_, frames_, write(out + channels_, scale_));
    product(frames_, head_dim_, {m.probability, queries_, 1}, m.grad, depth_, frames_,
            write(out + 2 * channels_, 1.0f));
  }

  const TemporalAttentionBackwardArgs& a_;
  const int frames_, head_dim_, depth_, queries_;
  const int64_t channels_;
  const float scale_;
  const int64_t pixels_;  // of all clips
  int64_t task_pixels_;
  std::vector<float> bias_;     // of transposed_bias
  std::vector<float> partial_;  // [tasks, heads, keys, queries]
};

}  // namespace

void temporal_attention_backward_cpu(const TemporalAttentionBackwardArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { TemporalBackward<decltype(kind)>(args).run(threads); });
}

}  // namespace vf::VF_ISA
