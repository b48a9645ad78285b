// Attention of one head: softmax(q k^T scale + bias) v, a block of keys at a time.
//
// Queries lie in the lanes: a vector holds one number (or two neighbouring bf16) of kLanes queries,
// and keys and values enter as broadcast words, so that the softmax needs no shuffles. Scores of a
// block of keys stay in L1; sums are in fp32, probabilities are rounded to the rows' dtype.
#pragma once
#include <type_traits>
#include <vector>

#include "cpu/base/math.h"
#include "spatial_attention.h"

namespace vf::VF_ISA {

constexpr int kKeyBlock = 128;
#if defined(__AVX512F__)
constexpr int kUnroll = 8;  // keys, or numbers of a head, in flight per vector of queries
#else
constexpr int kUnroll = 4;
#endif

// Room for packed values, the thread's own.
static inline uint32_t* values_scratch(int64_t words) {
  static thread_local std::vector<uint32_t> memory;
  if (int64_t(memory.size()) < words) memory.resize(words);
  return memory.data();
}

// What logits are multiplied with.
static inline float logit_scale(float given, int64_t head_dim) {
  return given > 0 ? given : float(1.0 / std::sqrt(double(head_dim)));
}

template <class T>
struct Head {
  const T *q, *k;
  int64_t q_stride, k_stride;
  const uint32_t* v;  // words of pack_values, or of v's own rows where T is fp32
  int64_t v_stride;   // in words
  const float* bias;  // of transposed_bias, or null
  int64_t bias_stride;
  T* out;
  int64_t out_stride;
  int q_len, k_len, head_dim;
  float scale;
};

// v [k_len, head_dim], rows of `stride` numbers, as words of two keys: [k_len / 2, head_dim].
template <class T>
static inline void pack_values(const T* v, int64_t stride, int k_len, int head_dim, uint32_t* out) {
  for (int j = 0; j < k_len; j += 2) {
    const T *a = v + j * stride, *b = j + 1 < k_len ? a + stride : nullptr;
    int d = 0;
#if defined(__AVX512F__)
    for (; d + 16 <= head_dim; d += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(load<__m256i>(a + d));
      const __m512i high = b ? _mm512_cvtepu16_epi32(load<__m256i>(b + d)) : _mm512_setzero_si512();
      store(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#endif
    for (; d < head_dim; ++d) out[d] = a[d].bits | uint32_t(b ? b[d].bits : 0) << 16;
    out += head_dim;
  }
}

// Queries that a bias has room for: attend_block may read two vectors from its last row on.
static inline int64_t bias_stride(int64_t q_len) { return q_len + 2 * kLanes; }

// bias [q_len, k_len] with queries in the lanes, for `exponential`: [k_len, bias_stride(q_len)].
template <class T>
static inline void transposed_bias(const float* bias, int q_len, int k_len, float* out) {
  for (int j = 0; j < k_len; ++j)
    for (int i = 0; i < q_len; ++i)
      out[j * bias_stride(q_len) + i] = bias[i * k_len + j] * kExponent<T>;
}

template <class T, int QV, int KU>
VF_INLINE void scores(const Head<T>& h, const U32* q, int words, const T* k, float* out, F32* top) {
  F32 acc[KU][QV] = {};
  for (int w = 0; w < words; ++w) {
    U32 x[QV];
#pragma GCC unroll 4
    for (int i = 0; i < QV; ++i) x[i] = q[w * QV + i];
#pragma GCC unroll 8
    for (int u = 0; u < KU; ++u) {
      const U32 y = broadcast(k + u * h.k_stride + w * kPerWord<T>);
#pragma GCC unroll 4
      for (int i = 0; i < QV; ++i) acc[u][i] = dot<T>(acc[u][i], x[i], y);
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < KU; ++u)
#pragma GCC unroll 4
    for (int i = 0; i < QV; ++i) {
      top[i] = maximum(top[i], acc[u][i]);
      store(out + (u * QV + i) * kLanes, acc[u][i]);
    }
}

// The head's attention for up to QV * kLanes queries from `row` on.
template <class T, int QV>
static __attribute__((noinline)) void attend_block(const Head<T>& h, int row) {
  constexpr int kQueries = QV * kLanes;
  alignas(64) float score[kKeyBlock * kQueries];
  alignas(64) U32 probability[(kKeyBlock / kPerWord<T>)*QV];
  alignas(64) float out[kMaxHeadDim * kQueries];
  alignas(64) U32 q[kMaxHeadDim / kPerWord<T> * QV], column[kMaxHeadDim / kPerWord<T>];
  const int words = h.head_dim / kPerWord<T>;
  const float scale = h.scale * kExponent<T>;

  int rows[QV];
  for (int i = 0; i < QV; ++i) {
    rows[i] = std::clamp(h.q_len - row - i * kLanes, 0, kLanes);
    load_columns_of_words(reinterpret_cast<const char*>(h.q + (row + i * kLanes) * h.q_stride),
                          h.q_stride * sizeof(T), rows[i], words, column);
    for (int w = 0; w < words; ++w) q[w * QV + i] = column[w];
  }

  F32 top[QV], total[QV];
  for (int i = 0; i < QV; ++i) top[i] = splat(-1e30f), total[i] = splat(0);
  for (int first = 0; first < h.k_len; first += kKeyBlock) {
    const int keys = std::min(kKeyBlock, h.k_len - first);
    const T* k = h.k + first * h.k_stride;
    F32 highest[QV];
    for (int i = 0; i < QV; ++i) highest[i] = top[i];
    int j = 0;
    const auto next = [&](auto count) {
      constexpr int KU = decltype(count)::value;
      for (; j + KU <= keys; j += KU)
        scores<T, QV, KU>(h, q, words, k + j * h.k_stride, score + j * kQueries, highest);
    };
    next(std::integral_constant<int, kUnroll>());
    next(std::integral_constant<int, kUnroll / 2>());
    next(std::integral_constant<int, 1>());
    if (h.bias) {  // logits are then complete
      for (int i = 0; i < QV; ++i) highest[i] = top[i];
      for (j = 0; j < keys; ++j)
        for (int i = 0; i < QV; ++i) {
          const F32 bias = load<F32>(h.bias + (first + j) * h.bias_stride + row + i * kLanes);
          float* s = score + (j * QV + i) * kLanes;
          const F32 logit = load<F32>(s) * scale + bias;
          store(s, logit);
          highest[i] = maximum(highest[i], logit);
        }
    }
    const float factor = h.bias ? 1.0f : scale;
    F32 offset[QV], fade[QV];
    for (int i = 0; i < QV; ++i) {
      fade[i] = exponential<T>((top[i] - highest[i]) * factor);
      top[i] = highest[i];
      offset[i] = top[i] * factor;
      total[i] *= fade[i];
    }
    F32 sum[QV] = {};  // of this block alone: fewer roundings
    const int pairs = (keys + kPerWord<T> - 1) / kPerWord<T>;
    for (int p = 0; p < pairs; ++p)
#pragma GCC unroll 4
      for (int i = 0; i < QV; ++i) {
        const float* s = score + (p * kPerWord<T> * QV + i) * kLanes;
        const F32 even = exponential<T>(load<F32>(s) * factor - offset[i]);
        F32 odd = {};
        if (kPerWord<T> == 2 && 2 * p + 1 < keys)
          odd = exponential<T>(load<F32>(s + kQueries) * factor - offset[i]);
        sum[i] += even + odd;
        probability[p * QV + i] = words_of<T>(even, odd);
      }
    for (int i = 0; i < QV; ++i) total[i] += sum[i];
    const uint32_t* v = h.v + first / kPerWord<T> * h.v_stride;
    for (int d = 0; d < h.head_dim; d += kUnroll) {
      F32 acc[kUnroll][QV] = {};
      for (int p = 0; p < pairs; ++p) {
        U32 x[QV];
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) x[i] = probability[p * QV + i];
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u) {
          const U32 y = broadcast(v + p * h.v_stride + d + u);
#pragma GCC unroll 4
          for (int i = 0; i < QV; ++i) acc[u][i] = dot<T>(acc[u][i], x[i], y);
        }
      }
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) {
          float* o = out + ((d + u) * QV + i) * kLanes;
          store(o, first ? load<F32>(o) * fade[i] + acc[u][i] : acc[u][i]);
        }
    }
  }

  for (int i = 0; i < QV; ++i) {
    const F32 inverse = 1.0f / total[i];
    for (int w = 0; w < words; ++w) {
      const float* o = out + (w * kPerWord<T> * QV + i) * kLanes;
      const F32 odd = kPerWord<T> == 2 ? load<F32>(o + kQueries) * inverse : F32{};
      column[w] = words_of<T>(load<F32>(o) * inverse, odd);
    }
    store_columns_of_words(column,
                           reinterpret_cast<char*>(h.out + (row + i * kLanes) * h.out_stride),
                           h.out_stride * sizeof(T), rows[i], words);
  }
}

// v as `Head` wants it: in `scratch`, ceil(k_len / 2) * head_dim words, where T is bf16.
template <class T>
static inline void set_values(Head<T>& h, const T* v, int64_t stride, uint32_t* scratch) {
  if constexpr (sizeof(T) == 4) {
    h.v = reinterpret_cast<const uint32_t*>(v);
    h.v_stride = stride;
  } else {
    pack_values(v, stride, h.k_len, h.head_dim, scratch);
    h.v = scratch;
    h.v_stride = h.head_dim;
  }
}

// All queries from first to last.
template <class T>
static inline void attend_rows(const Head<T>& h, int first, int last) {
  int row = first;
  for (; last - row > kLanes; row += 2 * kLanes) attend_block<T, 2>(h, row);
  if (row < last) attend_block<T, 1>(h, row);
}

}  // namespace vf::VF_ISA
