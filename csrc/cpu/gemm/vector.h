// The form of products (gemm.h) that vector instructions compute: a tile of a few rows by a panel
// of a few vectors of columns.
//
// Weights are packed per panel: [panel][word of the depth][columns of the panel], so that a product
// reads them in order. A vector of columns is multiplied with a broadcast word of a row; with
// avx512, 6 rows by 4 vectors keep all multipliers busy from L1 and L2.
//
// A long chain of fp32 additions loses digits: its error grows with the root of its length. So fp32
// rows are summed in runs of kRun terms, and the runs' sums are added up in turn: 9,216 terms err
// hardly more than 128 do. Runs are counted through the depth, with what padding skips, so that
// they are the same for every tile. Sums of bf16 products are exact enough without.
#pragma once
#include <vector>

#include "cpu/base/math.h"
#include "row_matmul.h"

namespace vf::VF_ISA {

#if defined(__AVX512F__)
constexpr int kPanel = 4;  // vectors of columns
#else
constexpr int kPanel = 2;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kRun = 128;

// How columns are dealt to panels: as evenly as vectors allow. With geglu a panel holds as many
// vectors of values as of the gates that belong to them, and `width` counts the values.
struct Panels {
  int64_t units, count;  // a unit: a vector, or one of values and one of gates
  int unit;
  Panels(int64_t width, bool geglu) {
    unit = geglu ? 2 : 1;
    units = (width + kLanes - 1) / kLanes;
    const int most = kPanel / unit;
    count = (units + most - 1) / most;
  }
  int64_t first(int64_t panel) const {  // unit
    return panel * (units / count) + std::min(panel, units % count);
  }
  int vectors(int64_t panel) const { return int(first(panel + 1) - first(panel)) * unit; }
  int64_t words(int64_t depth_words) const { return units * unit * kLanes * depth_words; }
};

// depth: of a column of the packed weights, in words; what the weights lack is 0.
template <class T, class Panels>
static void pack_panels(const PackWeightsArgs& a, const Panels& panels, int64_t depth) {
  const int64_t given = a.depth / kPerWord<T>;
  const auto* words = static_cast<const uint32_t*>(a.weights);  // [columns, depth]
  auto* out = static_cast<uint32_t*>(a.out);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int vectors = panels.vectors(p), values = vectors / panels.unit;
    for (int v = 0; v < vectors; ++v)
      for (int i = 0; i < kLanes; ++i) {
        const int64_t column = (panels.first(p) + v % values) * kLanes + i;
        const uint32_t* from = words + (column + (v >= values ? a.columns : 0)) * given;
        uint32_t* to = out + v * kLanes + i;
        for (int64_t k = 0; k < depth; ++k)
          to[k * vectors * kLanes] = column < a.columns && k < given ? from[k] : 0;
      }
    out += vectors * kLanes * depth;
  }
}

struct Range {
  int64_t first, last;
};

// What a product needs of a thread: sums, [rows, columns of the widest panel], and a row of zeros
// of the widest source.
template <class T>
struct Scratch {
  float* sums;
  const T* zeros;
};

// One tile: rows [row, row + MR) of a panel, for the taps [first, last) of all sources.
template <class T>
struct Tile {
  const RowMatmulArgs* a;
  const uint32_t* weights;  // of the panel, at the first tap
  int first, last;          // taps, counted through all sources
  bool opens, closes;       // whether sums start here, and end here
  float* sums;              // [MR, vectors * kLanes], between parts of the depth and runs
  int64_t row, column;      // of out
  const T* zeros;
};

// [residual +] the tile's sums into the rows `to` of out.
template <class T, class O, int MR, int NV, int Stored>
VF_INLINE void write(const Tile<T>& t, const int64_t (&to)[MR], F32 (&acc)[MR][NV]) {
  const RowMatmulArgs& a = *t.a;
  const T* residual = static_cast<const T*>(a.residual) + t.row * a.residual_stride + t.column;
  O* const first = static_cast<O*>(a.out) + t.column;
  if (t.column + Stored * kLanes <= a.columns) {
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r, residual += a.residual_stride) {
      O* const out = first + to[r] * a.out_stride;
      if (a.residual)
#pragma GCC unroll 4
        for (int v = 0; v < Stored; ++v) acc[r][v] += load_row(residual + v * kLanes);
#pragma GCC unroll 2
      for (int v = 0; v + 1 < Stored; v += 2) store_row(out + v * kLanes, acc[r][v], acc[r][v + 1]);
      if (Stored % 2) store_row(out + (Stored - 1) * kLanes, acc[r][Stored - 1]);
    }
    return;
  }
  for (int r = 0; r < MR; ++r, residual += a.residual_stride)
    for (int v = 0; v < Stored; ++v) {
      const int n = columns_left(a.columns, t.column + v * kLanes);
      if (a.residual) acc[r][v] += load_columns(residual + v * kLanes, n);
      store_columns(first + to[r] * a.out_stride + v * kLanes, acc[r][v], n);
    }
}

template <class T, int MR, int NV>
VF_INLINE void finish(const Tile<T>& t, const int64_t (&to)[MR], F32 (&acc)[MR][NV]) {
  constexpr int kHalf = NV / 2 ? NV / 2 : 1;
  if (t.a->epilogue == Epilogue::geglu) {
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV / 2; ++v) acc[r][v] *= gelu<T>(acc[r][kHalf + v]);
    write<T, T, MR, NV, kHalf>(t, to, acc);
    return;
  }
  if (t.a->epilogue == Epilogue::gelu || t.a->epilogue == Epilogue::quick_gelu) {
    const bool quick = t.a->epilogue == Epilogue::quick_gelu;
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v)
        acc[r][v] = quick ? quick_gelu<T>(acc[r][v]) : gelu<T>(acc[r][v]);
  }
  if (t.a->out_f32) {
    write<T, float, MR, NV, NV>(t, to, acc);
  } else {
    write<T, T, MR, NV, NV>(t, to, acc);
  }
}

// The tile's part of out and of the residual, on its way to the cache while the sums are made.
template <class T, int MR, int NV>
VF_INLINE void prefetch(const Tile<T>& t, const int64_t (&to)[MR]) {
  const RowMatmulArgs& a = *t.a;
  const int64_t size = a.out_f32 ? 4 : sizeof(T);
  const int bytes = int((a.epilogue == Epilogue::geglu ? NV / 2 : NV) * kLanes * size);
  const char* out = static_cast<const char*>(a.out) + t.column * size;
  for (int r = 0; r < MR; ++r)
    for (int at = 0; at < bytes; at += 64)
      __builtin_prefetch(out + to[r] * a.out_stride * size + at, 1);
}

// One row's bias for a panel; with geglu that of its values, then that of its gates.
template <int NV>
VF_INLINE void load_bias(const RowMatmulArgs& a, const float* bias, int64_t column,
                         F32 (&out)[NV]) {
  const int values = a.epilogue == Epilogue::geglu ? NV / 2 : NV;
  if (column + values * kLanes <= a.columns) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      out[v] = load<F32>(
          bias + (v < values ? column + v * kLanes : a.columns + column + (v - values) * kLanes));
    return;
  }
  for (int v = 0; v < NV; ++v) {
    const int64_t c = column + (v < values ? v : v - values) * kLanes;
    const int n = columns_left(a.columns, c);
    out[v] = load_columns(bias + c + (v < values ? 0 : a.columns), n);
  }
}

// sums = acc, or sums + acc.
template <int MR, int NV>
VF_INLINE void put_by(float* sums, bool add, F32 (&acc)[MR][NV]) {
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* const to = sums + (r * NV + v) * kLanes;
      store(to, add ? load<F32>(to) + acc[r][v] : acc[r][v]);
    }
}

// Mapped: whether any table says which rows are read or written.
template <class T, int MR, int NV, bool Mapped>
static __attribute__((noinline)) void tile(const Tile<T>& t) {
  constexpr bool kInRuns = sizeof(T) == 4;
  const RowMatmulArgs& a = *t.a;
  F32 acc[MR][NV];
  if (!t.opens) {
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[r][v] = kInRuns ? F32{} : load<F32>(t.sums + (r * NV + v) * kLanes);
  } else if (!a.bias_rows) {
    F32 bias[NV] = {};
    if (a.bias) load_bias<NV>(a, a.bias, t.column, bias);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = bias[v];
  } else {
    for (int r = 0; r < MR; ++r)
      load_bias<NV>(a, a.bias + (t.row + r) / a.bias_rows * a.bias_stride, t.column, acc[r]);
  }

  int64_t item[MR], at[MR], to[MR];
  if constexpr (Mapped) {
    item[0] = t.row / a.item_rows, at[0] = t.row - item[0] * a.item_rows;
    for (int r = 1; r < MR; ++r) {
      const bool next = at[r - 1] + 1 == a.item_rows;
      item[r] = item[r - 1] + next, at[r] = next ? 0 : at[r - 1] + 1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
    to[r] = Mapped && a.out_table ? item[r] * a.item_rows_out + a.out_table[at[r]] : t.row + r;
  if (t.closes) prefetch<T, MR, NV>(t, to);
  const uint32_t* w = t.weights;
  bool begun = !t.opens;  // whether t.sums hold what was summed before acc
  int64_t in_run = 0;     // terms of acc
  const auto end_run = [&] {
    put_by<MR, NV>(t.sums, begun, acc);
    begun = true, in_run = 0;
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = F32{};
  };
  int tap = 0;
  for (int i = 0; i < a.sources.count; ++i) {
    const RowSource& s = a.sources.at[i];
    const int64_t words = s.width / kPerWord<T>;
    for (int64_t j = 0; j < s.taps; ++j, ++tap) {
      if (tap < t.first || tap >= t.last) continue;
      const T *x = static_cast<const T*>(s.x), *rows[MR];
      if (Mapped && s.table) {
        int32_t any = -1;
        const int32_t* table = s.table + j * a.item_rows;
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
          const int32_t from = table[at[r]];
          rows[r] = from < 0 ? t.zeros : x + (item[r] * s.item_rows + from) * s.stride;
          any = std::max(any, from);
        }
        if (any < 0) {  // padding alone
          w += words * NV * kLanes;
          if (kInRuns && in_run + words >= kRun) {
            const int64_t terms = in_run + words;
            end_run();
            in_run = terms % kRun;
          } else {
            in_run += words;
          }
          continue;
        }
      } else {
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) rows[r] = x + (t.row + r) * s.stride;
      }
      int64_t k = 0;
      do {
        const int64_t end = kInRuns ? std::min(words, k + kRun - in_run) : words;
        in_run += end - k;
#pragma GCC unroll 2
        for (; k < end; ++k) {
          U32 y[NV];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) y[v] = load<U32>(w + v * kLanes);
          w += NV * kLanes;
#pragma GCC unroll 6
          for (int r = 0; r < MR; ++r) {
            const U32 b = broadcast(rows[r] + k * kPerWord<T>);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = dot<T>(acc[r][v], y[v], b);
          }
        }
        if (kInRuns && in_run == kRun) end_run();
      } while (k < words);
    }
  }

  if (!t.closes) {
    put_by<MR, NV>(t.sums, kInRuns && begun, acc);
    return;
  }
  if (kInRuns && begun)
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += load<F32>(t.sums + (r * NV + v) * kLanes);
  finish<T, MR, NV>(t, to, acc);
}

// All rows [row, last) of a panel: tiles of 6, and of 4, 2 and 1 at the end.
template <class T, int NV, bool Mapped>
static void tiles(Tile<T>& t, int64_t last) {
  const int64_t start = t.row;
  float* const sums = t.sums;
  while (t.row < last) {
    const int64_t left = last - t.row;
    if (!t.opens || !t.closes) t.sums = sums + (t.row - start) * NV * kLanes;
    if (left >= 6 && left != 8) {
      tile<T, 6, NV, Mapped>(t), t.row += 6;
    } else if (left >= 4) {
      tile<T, 4, NV, Mapped>(t), t.row += 4;
    } else if (left >= 2) {
      tile<T, 2, NV, Mapped>(t), t.row += 2;
    } else {
      tile<T, 1, NV, Mapped>(t), t.row += 1;
    }
  }
  t.row = start;
  t.sums = sums;
}

// Parts of the depth whose weights stay in L2 while all rows of a block pass.
constexpr int64_t kPartBytes = 384 * 1024;

template <class T, bool Mapped>
static void panel_tiles(Tile<T>& t, int64_t last, int vectors) {
  switch (vectors) {
    case 1:
      return tiles<T, 1, Mapped>(t, last);
    case 2:
      return tiles<T, 2, Mapped>(t, last);
#if defined(__AVX512F__)
    case 3:
      return tiles<T, 3, Mapped>(t, last);
    case 4:
      return tiles<T, 4, Mapped>(t, last);
#endif
  }
}

template <class T>
struct VectorGemm {
  using Panels = vf::VF_ISA::Panels;
  static constexpr int64_t kColumns = kPanel * kLanes;
  static constexpr int64_t kRowStep = kTileRows;

  static int64_t packed_words(const Panels& panels, int64_t depth) {
    return panels.words(depth / kPerWord<T>);
  }

  static void pack(const PackWeightsArgs& a) {
    const Panels panels(a.columns, a.geglu);
    pack_panels<T>(a, panels, a.depth / kPerWord<T>);
  }

  // Rows that stay in L2.
  static int64_t block_rows(const RowMatmulArgs& a) {
    int64_t width = 0;
    for (int i = 0; i < a.sources.count; ++i) width += a.sources.at[i].width;
    return std::clamp<int64_t>(128 * 1024 / (width * int64_t(sizeof(T))), 48, 384);
  }

  static void multiply(const RowMatmulArgs& a, Range rows, Range part, const Scratch<T>& scratch) {
    const Panels panels(a.columns, a.epilogue == Epilogue::geglu);
    int64_t depth = 0, width[kMaxTaps];  // in words, of all taps and of each
    int taps = 0;
    bool mapped = a.out_table != nullptr;
    for (int i = 0; i < a.sources.count; ++i) {
      const RowSource& source = a.sources.at[i];
      for (int64_t j = 0; j < source.taps; ++j) depth += width[taps++] = source.width / kPerWord<T>;
      mapped |= source.table != nullptr;
    }
    const auto* weights = static_cast<const uint32_t*>(a.weights);
    for (int64_t panel = part.first; panel < part.last; ++panel) {
      const int vectors = panels.vectors(panel);
      const int64_t lanes = vectors * kLanes;
      Tile<T> t{&a,
                weights + panels.first(panel) * panels.unit * kLanes * depth,
                0,
                0,
                true,
                false,
                scratch.sums,
                rows.first,
                panels.first(panel) * kLanes,
                scratch.zeros};
      while (t.first < taps) {
        int64_t words = 0;
        do words += width[t.last++];
        while (t.last < taps && (words + width[t.last]) * lanes * 4 <= kPartBytes);
        t.closes = t.last == taps;
        mapped ? panel_tiles<T, true>(t, rows.last, vectors)
               : panel_tiles<T, false>(t, rows.last, vectors);
        t.weights += words * lanes;
        t.first = t.last;
        t.opens = false;
      }
    }
  }

  class PanelSums {
   public:
    PanelSums(int64_t columns, int64_t rows, const T* zeros)
        : panels(columns, false), rows_(rows), zeros_(zeros) {
      product_.sources.count = 1;
      product_.sources.at[0] = {nullptr, 0, 0, nullptr, 1, rows};
      product_.rows = product_.item_rows = rows;
      product_.columns = columns;
    }

    void operator()(const T* x, int64_t depth, const uint32_t* weights, int64_t panel, bool opens,
                    float* sums) {
      RowSource& source = product_.sources.at[0];
      source.x = x, source.stride = source.width = depth;
      const int64_t column = panels.first(panel) * kLanes;
      Tile<T> t{&product_, weights, 0, 1, opens, false, sums, 0, column, zeros_};
      panel_tiles<T, false>(t, rows_, panels.vectors(panel));
    }

    const Panels panels;

   private:
    const int64_t rows_;
    const T* zeros_;
    RowMatmulArgs product_{};
  };
};

}  // namespace vf::VF_ISA
