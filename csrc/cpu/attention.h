// Attention of one head: softmax(q k^T scale + bias) v, a block of keys at a time.
//
// Queries lie in the lanes: a vector holds one number (or two neighbouring bf16) of kLanes queries,
// and keys and values enter as broadcast words, so that the softmax needs no shuffles. Scores of a
// block of keys stay in L1; sums are in fp32, probabilities are rounded to the rows' dtype.
//
// A matrix unit computes the same two products, k q^T and v^T p, from the same memory: words of
// queries, and of probabilities, are tiles of its second factor. Its first factor is a row of the
// keys, or of the values turned, filled up with zeros to whole tiles.
#pragma once
#include <type_traits>
#include <vector>

#include "cpu/base/math.h"
#include "cpu/base/tiles.h"
#include "spatial_attention.h"

namespace vf::VF_ISA {

constexpr int round_up(int x, int step) { return (x + step - 1) / step * step; }

constexpr int kKeyBlock = 128;
#if defined(__AVX512F__)
constexpr int kUnroll = 8;  // keys, or numbers of a head, in flight per vector of queries
#else
constexpr int kUnroll = 4;
#endif

// Vectors of queries that are one tile wide, or one.
template <class T>
constexpr int kQueryVectors = kInTiles<T> ? kTile / kLanes : 1;

// What logits are multiplied with.
static inline float logit_scale(float given, int64_t head_dim) {
  return given > 0 ? given : float(1.0 / std::sqrt(double(head_dim)));
}

// Gives the thread its tiles, where attention is computed in them; the caller's.
template <class T>
using AttentionScope = std::conditional_t<kInTiles<T>, TileScope, NoTileScope>;

// k and v: as set_keys leaves them.
template <class T>
struct Head {
  const T* q;
  int64_t q_stride;
  const T* k;
  int64_t k_stride;
  const uint32_t* v;  // words of pack_values, or of v's own rows where T is fp32; in tiles: of v^T
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

// Queries that a bias has room for: attend_block may read as many from its last row on.
static inline int64_t bias_stride(int64_t q_len) { return q_len + 2 * std::max(kLanes, kTile); }

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

#if VF_TILES
// out [16 G, 16 Q] = the products of rows of a, a_stride bytes apart, and of the words b [16 steps,
// 16 Q]; `add`: to what is there.
template <int G, int Q>
static __attribute__((noinline)) void multiply_tiles(const char* a, int64_t a_stride, const U32* b,
                                                     int steps, bool add, float* out) {
  const int64_t stride = Q * kTileRowBytes;
  const auto* words = reinterpret_cast<const char*>(b);
  const auto each_sum = [&](const auto& body) {
    unrolled<G>([&](auto g) {
      unrolled<Q>([&](auto i) {
        body(std::integral_constant<int, g * Q + i>(), out + (g * kTile * Q + i) * kTile);
      });
    });
  };
  if (add)
    each_sum([&](auto tile, const float* from) { tile_load<tile>(from, stride); });
  else
    each_sum([](auto tile, const float*) { tile_zero<tile>(); });
  for (int step = 0; step < steps; ++step, words += kTile * stride) {
    unrolled<Q>([&](auto i) { tile_load<4 + i>(words + i * kTileRowBytes, stride); });
    unrolled<G>([&](auto g) {
      tile_load<6 + g>(a + g * kTile * a_stride + step * kTileRowBytes, a_stride);
      unrolled<Q>([&](auto i) { tile_multiply_add<g * Q + i, 6 + g, 4 + i>(); });
    });
  }
  each_sum([&](auto tile, float* to) { tile_store<tile>(to, stride); });
}

// The same for `groups` of 16 rows.
template <int Q>
VF_INLINE void multiply_tiles(const char* a, int64_t a_stride, int groups, const U32* b, int steps,
                              bool add, float* out) {
  int g = 0;
  for (; g + 2 <= groups; g += 2)
    multiply_tiles<2, Q>(a + g * kTile * a_stride, a_stride, b, steps, add,
                         out + g * kTile * kTile * Q);
  if (g < groups)
    multiply_tiles<1, Q>(a + g * kTile * a_stride, a_stride, b, steps, add,
                         out + g * kTile * kTile * Q);
}
#endif

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
  if constexpr (kInTiles<T>) std::fill(q + words * QV, q + round_up(words, kTile) * QV, U32{});

  F32 top[QV], total[QV];
  for (int i = 0; i < QV; ++i) top[i] = splat(-1e30f), total[i] = splat(0);
  for (int first = 0; first < h.k_len; first += kKeyBlock) {
    const int keys = std::min(kKeyBlock, h.k_len - first);
    const T* k = h.k + first * h.k_stride;
    F32 highest[QV];
    for (int i = 0; i < QV; ++i) highest[i] = top[i];
    if constexpr (kInTiles<T>) {
#if VF_TILES
      multiply_tiles<kQueries / kTile>(reinterpret_cast<const char*>(k), h.k_stride * sizeof(T),
                                       round_up(keys, kTile) / kTile, q,
                                       round_up(words, kTile) / kTile, false, score);
#endif
      for (int j = 0; j < keys && !h.bias; ++j)
        for (int i = 0; i < QV; ++i)
          highest[i] = maximum(highest[i], load<F32>(score + (j * QV + i) * kLanes));
    } else {
      int j = 0;
      const auto next = [&](auto count) {
        constexpr int KU = decltype(count)::value;
        for (; j + KU <= keys; j += KU)
          scores<T, QV, KU>(h, q, words, k + j * h.k_stride, score + j * kQueries, highest);
      };
      next(std::integral_constant<int, kUnroll>());
      next(std::integral_constant<int, kUnroll / 2>());
      next(std::integral_constant<int, 1>());
    }
    if (h.bias) {  // logits are then complete
      for (int i = 0; i < QV; ++i) highest[i] = top[i];
      for (int j = 0; j < keys; ++j)
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
    if constexpr (kInTiles<T>) {
#if VF_TILES
      std::fill(probability + pairs * QV, probability + round_up(pairs, kTile) * QV, U32{});
      for (int d = 0; d < h.head_dim && first; ++d)
        for (int i = 0; i < QV; ++i) {
          float* o = out + (d * QV + i) * kLanes;
          store(o, load<F32>(o) * fade[i]);
        }
      multiply_tiles<kQueries / kTile>(reinterpret_cast<const char*>(h.v + first / 2),
                                       h.v_stride * 4, round_up(h.head_dim, kTile) / kTile,
                                       probability, round_up(pairs, kTile) / kTile, first, out);
#endif
      continue;
    }
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

// v [k_len, head_dim], rows of `stride` numbers, turned: [head_dim, k_len] in rows of `out_stride`,
// filled up with zeros to multiples of 16 and 32.
static inline void turn_values(const BFloat16* v, int64_t stride, int k_len, int head_dim,
                               BFloat16* out, int64_t out_stride) {
#if defined(__AVX512F__)
  const auto row = [&](int j, int d) {
    if (j >= k_len) return _mm512_setzero_si512();
    const __mmask16 mask = head_dim - d >= 16 ? 0xffff : __mmask16((1u << (head_dim - d)) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v + j * stride + d));
  };
  for (int j = 0; j < k_len; j += 32)
    for (int d = 0; d < head_dim; d += 16) {
      U32 block[16];
      for (int i = 0; i < 16; ++i)
        block[i] =
            (U32)_mm512_or_si512(row(j + 2 * i, d), _mm512_slli_epi32(row(j + 2 * i + 1, d), 16));
      transpose_16(block);
      for (int i = 0; i < 16; ++i) store(out + (d + i) * out_stride + j, block[i]);
    }
#else
  for (int d = 0; d < round_up(head_dim, 16); ++d)
    for (int j = 0; j < round_up(k_len, 32); ++j)
      out[d * out_stride + j] = d < head_dim && j < k_len ? v[j * stride + d] : BFloat16{};
#endif
}

// k and v [k_len, head_dim], rows of `stride` numbers, as the products read them; what is packed is
// good until the thread's next call. Of h, k_len and head_dim are known.
template <class T>
static inline void set_keys(Head<T>& h, const T* k, const T* v, int64_t stride) {
  static thread_local std::vector<uint32_t> memory;
  const auto room = [](int64_t words) {
    if (int64_t(memory.size()) < words) memory.resize(words);
    return memory.data();
  };
  h.k = k;
  h.k_stride = stride;
  if constexpr (kInTiles<T>) {
    // Values' rows a multiple of 4 KiB apart would share one set of L1.
    const int keys = round_up(h.k_len, 32), dim = round_up(h.head_dim, 32), width = keys + 32;
    uint32_t* packed = room((int64_t(keys) * dim + int64_t(dim) * width) / 2);
    T* rows = reinterpret_cast<T*>(packed);
    std::memset(static_cast<void*>(rows), 0, int64_t(keys) * dim * sizeof(T));
    for (int j = 0; j < h.k_len; ++j)
      std::memcpy(rows + int64_t(j) * dim, k + j * stride, h.head_dim * sizeof(T));
    h.k = rows;
    h.k_stride = dim;
    h.v = packed + int64_t(keys) * dim / 2;
    h.v_stride = width / 2;
    turn_values(v, stride, h.k_len, h.head_dim, rows + int64_t(keys) * dim, width);
  } else if constexpr (sizeof(T) == 4) {
    h.v = reinterpret_cast<const uint32_t*>(v);
    h.v_stride = stride;
  } else {
    uint32_t* words = room(int64_t(h.k_len + 1) / 2 * h.head_dim);
    pack_values(v, stride, h.k_len, h.head_dim, words);
    h.v = words;
    h.v_stride = h.head_dim;
  }
}

// All queries from first to last.
template <class T>
static inline void attend_rows(const Head<T>& h, int first, int last) {
  constexpr int kVectors = kQueryVectors<T>, kQueries = kVectors * kLanes;
  int row = first;
  for (; last - row > kQueries; row += 2 * kQueries) attend_block<T, 2 * kVectors>(h, row);
  if (row < last) attend_block<T, kVectors>(h, row);
}

}  // namespace vf::VF_ISA
