// The form of products (gemm.h) that a matrix unit computes: bf16 rows, in tiles of 16 rows by 16
// columns, 32 numbers of the depth at a time.
//
// Weights are packed per panel of up to 64 columns: [panel][word of the depth][columns], the depth
// filled up with zeros to whole tiles. A tile of weights is then 16 words by 16 columns of a panel.
//
// Rows are read where they lie, 16 at a time, if they follow one another: a linear layer's do, and
// mostly those of a convolution's tap, but at the edges of a picture. Other groups of 16 rows are
// copied first, once for all columns: edges, what a table enlarges or halves, the last rows of a
// product. Rows whose width is no multiple of 32 are copied, all taps side by side.
//
// A block of four tiles of results is summed at a time, so that four products are under way while
// two tiles of rows and two of weights are loaded. Where the depth is long, it is cut into parts
// whose rows stay in L2; the sums wait in memory meanwhile. Every element is summed in the order of
// the depth, whatever the block and the part, so its bits depend on nothing else. That is also why
// few rows take no other instructions: a product of one row waits for its weights anyway.
#pragma once
#include "cpu/base/tiles.h"
#include "cpu/gemm/vector.h"

namespace vf::VF_ISA {

#if VF_TILES

// Panels of 64 columns, of whole tiles, counted in vectors as `Panels` are. With geglu 32 values
// and the 32 gates that belong to them.
struct TilePanels {
  int64_t units, count;
  int unit;
  TilePanels(int64_t width, bool geglu) {
    unit = geglu ? 2 : 1;
    units = (width + kTile - 1) / kTile * (kTile / kLanes);
    count = (units + most() - 1) / most();
  }
  int most() const { return 4 * kTile / kLanes / unit; }
  int64_t first(int64_t panel) const { return panel * most(); }
  int vectors(int64_t panel) const {
    return int(std::min<int64_t>(most(), units - first(panel))) * unit;
  }
  int64_t words(int64_t depth_words) const { return units * unit * kLanes * depth_words; }
};

class TileGemm {
 public:
  using T = BFloat16;
  using Panels = TilePanels;
  static constexpr int64_t kColumns = 4 * kTile;
  static constexpr int64_t kRowStep = 2 * kTile;

  static int64_t packed_words(const Panels& panels, int64_t depth) {
    return panels.words(padded(depth) / 2);
  }

  static void pack(const PackWeightsArgs& a) {
    pack_panels<T>(a, Panels(a.columns, a.geglu), padded(a.depth) / 2);
  }

  // Rows that are multiplied at a time: those of a part of the depth stay in L2.
  static int64_t block_rows(const RowMatmulArgs& a) {
    const int64_t depth = std::min(depth_of(a), kPartDepth);
    return std::clamp<int64_t>(kBlockBytes / (2 * depth) / kRowStep * kRowStep, 2 * kRowStep, 256);
  }

  static void multiply(const RowMatmulArgs& a, Range rows, Range part, const Scratch<T>&) {
    const Panels panels(a.columns, a.epilogue == Epilogue::geglu);
    TileGemm product(a, rows);
    const int64_t depth = padded(product.depth_) / 2;
    const auto* weights = static_cast<const uint32_t*>(a.weights);
    const TileScope scope;
    while (product.next_part()) {
      float* sums = product.whole() ? scratch<float>(kSums, 4 * kTile * kColumns)
                                    : product.sums_of(part.last - part.first);
      for (int64_t panel = part.first; panel < part.last; ++panel) {
        const uint32_t* mine = weights + panels.words(depth) / panels.units * panels.first(panel);
        product.run(mine, panels.vectors(panel), panels.first(panel) * kLanes, sums);
        if (!product.whole()) sums += product.groups_ * kTile * kColumns;
      }
    }
  }

 private:
  static constexpr int64_t kPartDepth = 2048, kBlockBytes = 768 * 1024;
  static constexpr int64_t kPartBytes = 1024 * 1024;
  static constexpr int kGroups = 4;  // of 16 rows, whose results stay in L1

  // A stretch of the depth: `depth` numbers of a tap from `column` on.
  struct Stretch {
    int source;
    int64_t tap, column, depth;
  };

  // 16 rows in a stretch: their first byte, and the bytes from row to row.
  struct Rows16 {
    const char* at;
    int64_t stride;
  };

  static int64_t padded(int64_t depth) {
    return (depth + kTileDepth - 1) / kTileDepth * kTileDepth;
  }

  static int64_t depth_of(const RowMatmulArgs& a) {
    int64_t depth = 0;
    for (int i = 0; i < a.sources.count; ++i) depth += a.sources.at[i].taps * a.sources.at[i].width;
    return depth;
  }

  // Room of the thread, aligned to lines.
  enum Room { kSums, kCopies };
  template <class V>
  static V* scratch(Room room, int64_t count) {
    static thread_local std::vector<V> memory[2];
    constexpr int64_t kLine = 64 / sizeof(V);
    auto& mine = memory[room];
    if (int64_t(mine.size()) < count + kLine) mine.resize(count + kLine);
    return mine.data() + (-reinterpret_cast<uintptr_t>(mine.data()) % 64) / sizeof(V);
  }

  TileGemm(const RowMatmulArgs& a, Range rows)
      : a_(a), first_(rows.first), rows_(rows.last - rows.first), depth_(depth_of(a)) {
    groups_ = (rows_ + kTile - 1) / kTile;
    for (int i = 0; i < a.sources.count; ++i) {
      const RowSource& s = a.sources.at[i];
      side_by_side_ |= s.width % kTileDepth != 0;
      for (int64_t tap = 0; tap < s.taps; ++tap)
        for (int64_t column = 0; column < s.width; column += kPartDepth)
          stretches_.push_back({i, tap, column, std::min(kPartDepth, s.width - column)});
    }
  }

  bool opens() const { return first_stretch_ == 0; }
  bool closes() const { return last_stretch_ == stretches_.size(); }
  bool whole() const { return opens() && closes(); }

  float* sums_of(int64_t panels) const {
    return scratch<float>(kSums, panels * groups_ * kTile * kColumns);
  }

  // Finds or copies the rows of the next part of the depth; false: there is none.
  bool next_part() {
    first_stretch_ = last_stretch_;
    first_word_ += steps_ * kTile;
    if (closes()) return false;
    int64_t depth = 0;
    do depth += stretches_[last_stretch_++].depth;
    while (!closes() &&
           (side_by_side_ || (depth + stretches_[last_stretch_].depth) * 2 * rows_ <= kPartBytes));
    steps_ = padded(depth) / kTileDepth;
    side_by_side_ ? copy_side_by_side() : find_rows();
    return true;
  }

  // Where 16 rows of the product, counted from first_, read a stretch; null: zeros.
  void rows_of(const Stretch& s, int64_t row, const T* (&rows)[kTile]) const {
    const RowSource& source = a_.sources.at[s.source];
    const T* x = static_cast<const T*>(source.x) + s.column;
    const int count = int(std::min<int64_t>(kTile, rows_ - row));
    if (!source.table) {
      for (int i = 0; i < count; ++i) rows[i] = x + (first_ + row + i) * source.stride;
    } else {
      const int32_t* table = source.table + s.tap * a_.item_rows;
      const int64_t item_size = source.item_rows * source.stride;
      int64_t item = (first_ + row) / a_.item_rows, at = first_ + row - item * a_.item_rows;
      x += item * item_size;
      for (int i = 0; i < count; ++i) {
        rows[i] = table[at] < 0 ? nullptr : x + table[at] * source.stride;
        if (++at == a_.item_rows) at = 0, x += item_size;
      }
    }
    for (int i = count; i < kTile; ++i) rows[i] = nullptr;
  }

  static void copy(const T* from, int64_t depth, T* to) {
    from ? (void)std::memcpy(to, from, depth * sizeof(T))
         : (void)std::memset(static_cast<void*>(to), 0, depth * sizeof(T));
  }

  // All stretches of a row one after another, then zeros up to a whole tile.
  void copy_side_by_side() {
    const int64_t width = steps_ * kTileDepth, stride = apart(width);
    T* copies = scratch<T>(kCopies, groups_ * kTile * stride);
    for (int64_t row = 0; row < groups_ * kTile; row += kTile) {
      int64_t done = 0;
      const T* rows[kTile];
      for (size_t i = first_stretch_; i < last_stretch_; ++i) {
        rows_of(stretches_[i], row, rows);
        for (int r = 0; r < kTile; ++r)
          copy(rows[r], stretches_[i].depth, copies + (row + r) * stride + done);
        done += stretches_[i].depth;
      }
      for (int r = 0; r < kTile; ++r)
        copy(nullptr, width - done, copies + (row + r) * stride + done);
    }
    lengths_.assign(1, steps_);
    places_.resize(groups_);
    for (int64_t group = 0; group < groups_; ++group)
      places_[group] = {reinterpret_cast<const char*>(copies + group * kTile * stride),
                        stride * int64_t(sizeof(T))};
  }

  void find_rows() {
    lengths_.clear();
    places_.clear();
    int64_t room = 0;
    for (size_t i = first_stretch_; i < last_stretch_; ++i) {
      lengths_.push_back(stretches_[i].depth / kTileDepth);
      room += groups_ * kTile * apart(stretches_[i].depth);
    }
    T* copies = scratch<T>(kCopies, room);
    for (size_t i = first_stretch_; i < last_stretch_; ++i)
      for (int64_t group = 0; group < groups_; ++group)
        places_.push_back(find_rows(stretches_[i], group * kTile, copies));
  }

  Rows16 find_rows(const Stretch& s, int64_t row, T*& copies) {
    alignas(64) static const T kZeros[kPartDepth] = {};
    const T* rows[kTile];
    rows_of(s, row, rows);
    const auto address = [&](int i) { return reinterpret_cast<intptr_t>(rows[i]); };
    const int64_t stride = address(1) - address(0);
    bool regular = rows[0], none = !rows[0];
    for (int i = 1; i < kTile; ++i) {
      regular &= rows[i] && address(i) - address(i - 1) == stride;
      none &= !rows[i];
    }
    if (none) return {reinterpret_cast<const char*>(kZeros), 0};
    // Rows a multiple of 4 KiB apart would share one set of L1.
    if (regular && (stride % 4096 || !stride))
      return {reinterpret_cast<const char*>(rows[0]), stride};
    const int64_t width = apart(s.depth);
    for (int64_t i = 0; i < kTile; ++i) copy(rows[i], s.depth, copies + i * width);
    const Rows16 found{reinterpret_cast<const char*>(copies), width * int64_t(sizeof(T))};
    copies += kTile * width;
    return found;
  }

  // How far apart copied rows lie: an odd number of lines, so that they spread over L1.
  static int64_t apart(int64_t width) {
    return width / kTileDepth % 2 ? width : width + kTileDepth;
  }

  // One panel of this part, whose first column of the result is `out`: sums of all rows, four
  // groups at a time, [rows of the groups, columns]. Where the last part ends, they are finished.
  void run(const uint32_t* weights, int vectors, int64_t out, float* sums) {
    const int64_t columns = vectors * kLanes;
    const auto* panel = reinterpret_cast<const char*>(weights + first_word_ * columns);
    for (int64_t group = 0; group < groups_; group += kGroups) {
      const int64_t groups = std::min<int64_t>(kGroups, groups_ - group);
      float* mine = whole() ? sums : sums + group * kTile * columns;
      int64_t column = 0;
      for (; column + 2 * kTile <= columns; column += 2 * kTile)
        for (int64_t g = 0; g < groups; g += 2) {
          float* to = mine + g * kTile * columns + column;
          g + 1 < groups ? block<2, 2>(group + g, panel + column * 4, columns, to)
                         : block<1, 2>(group + g, panel + column * 4, columns, to);
        }
      if (column < columns) {
        float* to = mine + column;
        const char* from = panel + column * 4;
        if (groups == 4) {
          block<4, 1>(group, from, columns, to);
        } else {
          for (int64_t g = 0; g < groups; ++g)
            block<1, 1>(group + g, from, columns, to + g * kTile * columns);
        }
      }
      if (closes())
        finish_rows(vectors, out, group * kTile, std::min((group + groups) * kTile, rows_), mine);
    }
  }

  // sums [16 Groups, 16 Columns] = or += this part's products. Tiles: 0 to 3 hold sums, 4 and 5
  // weights, 6 and 7 rows.
  template <int Groups, int Columns>
  __attribute__((noinline)) void block(int64_t group, const char* weights, int64_t columns,
                                       float* sums) const {
    const int64_t stride = columns * 4;
    const auto each_sum = [&](const auto& body) {
      unrolled<Groups>([&](auto g) {
        unrolled<Columns>([&](auto c) {
          body(std::integral_constant<int, g * Columns + c>(),
               sums + g * kTile * columns + c * kTile);
        });
      });
    };
    if (opens())
      each_sum([](auto tile, float*) { tile_zero<tile>(); });
    else
      each_sum([&](auto tile, float* from) { tile_load<tile>(from, stride); });
    const Rows16* places = places_.data() + group;
    for (const int64_t steps : lengths_) {
      const char* rows[Groups];
      int64_t strides[Groups];
      for (int g = 0; g < Groups; ++g) rows[g] = places[g].at, strides[g] = places[g].stride;
      for (int64_t step = 0; step < steps; ++step) {
        unrolled<Columns>([&](auto c) { tile_load<4 + c>(weights + c * kTileRowBytes, stride); });
        unrolled<Groups>([&](auto g) {
          tile_load<6 + g % 2>(rows[g] + step * kTileRowBytes, strides[g]);
          unrolled<Columns>(
              [&](auto c) { tile_multiply_add<g * Columns + c, 6 + g % 2, 4 + c>(); });
        });
        weights += kTile * stride;
      }
      places += groups_;
    }
    each_sum([&](auto tile, float* to) { tile_store<tile>(to, stride); });
  }

  // epilogue(sums + bias) + residual of the rows [row, last), counted from first_.
  void finish_rows(int vectors, int64_t column, int64_t row, int64_t last,
                   const float* sums) const {
    constexpr int kStep = kTile / kLanes;
    switch (vectors / kStep) {
      case 1:
        return finish_rows<kStep>(column, row, last, sums);
      case 2:
        return finish_rows<2 * kStep>(column, row, last, sums);
      case 3:
        return finish_rows<3 * kStep>(column, row, last, sums);
      case 4:
        return finish_rows<4 * kStep>(column, row, last, sums);
    }
  }

  template <int NV>
  void finish_rows(int64_t column, int64_t row, int64_t last, const float* sums) const {
    Tile<T> tile{};
    tile.a = &a_;
    tile.column = column;
    F32 bias[NV] = {};
    if (a_.bias && !a_.bias_rows) load_bias<NV>(a_, a_.bias, column, bias);
    for (; row < last; ++row, sums += NV * kLanes) {
      tile.row = first_ + row;
      if (a_.bias_rows)
        load_bias<NV>(a_, a_.bias + tile.row / a_.bias_rows * a_.bias_stride, column, bias);
      F32 acc[1][NV];
      for (int v = 0; v < NV; ++v) acc[0][v] = load<F32>(sums + v * kLanes) + bias[v];
      int64_t to[1] = {tile.row};
      if (a_.out_table) {
        const int64_t item = tile.row / a_.item_rows;
        to[0] = item * a_.item_rows_out + a_.out_table[tile.row - item * a_.item_rows];
      }
      finish<T, 1, NV>(tile, to, acc);
    }
  }

  const RowMatmulArgs& a_;
  const int64_t first_, rows_, depth_;
  int64_t groups_ = 0;
  bool side_by_side_ = false;
  std::vector<Stretch> stretches_;
  // The part of the depth that is at hand: its stretches, its first word, its steps, and those of
  // each length of rows that `places_` [lengths, groups] has.
  size_t first_stretch_ = 0, last_stretch_ = 0;
  int64_t first_word_ = 0, steps_ = 0;
  std::vector<int64_t> lengths_;
  std::vector<Rows16> places_;
};

#endif  // VF_TILES

}  // namespace vf::VF_ISA
