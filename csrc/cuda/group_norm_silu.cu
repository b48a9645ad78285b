// y = SiLU(((x - mu) / sqrt(var + eps) weight + bias) (1 + scale) + shift) = SiLU(a (x - centre) +
// b)
//
// x: [B, P, C], and x2, whose channels follow; a set is num_frames images, which share statistics.
// A slab is neighbouring groups of a set, in 16-byte vectors where memory allows; a thread owns one
// vector's channels and every slots-th row of it. `one_launch` chooses by shape between
//
//   slab_kernel    a block to a slab: its statistics, then y. Rows that fit are kept in shared
//                  memory, so that x moves once; the rest comes again, from L2
//   chunk_kernel   mean and centred squares of a group in each chunk of a slab's rows, then
//   apply_kernel   merges those of its groups, then y; begins where chunk_kernel ended, in L2
//
// No atomics: the order of sums depends on the shape alone. a, b and centre, which is mu for fp32
// and 0 for 16 bits, are made once a channel of a block.
#include "cuda/group_norm.cuh"

namespace vf {

namespace {

constexpr int kTable = 1024;      // lines that slab_kernel has room for
constexpr int kApplyBytes = 128;  // of a row that a block of apply_kernel has: whole cache lines

// ---- One launch ---------------------------------------------------------------------------------

// kept: rows of a thread that shared memory holds; tables: of lines, one an image or one in all.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    slab_kernel(const GroupNormSiluArgs args, const Slab slab, int kept, int tables) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  VF_SHARED(Line, lines, kTable);
  VF_DYNAMIC_SHARED(uint4, rows_kept);  // of T, a Group would come by elements
  const int tid = int(threadIdx.x), slot = tid / slab.columns, column = tid % slab.columns;
  const int set = int(blockIdx.x) / slab.count;
  const int64_t first = int64_t(int(blockIdx.x) % slab.count) * slab.channels;
  const int rows = int(args.rows * args.num_frames), mine = rows_of(slot, rows, slab.slots);
  const int64_t step = slab.slots * all_channels(args), image = set * args.num_frames;
  const int64_t channel = first + column * kSize, first_row = int64_t(set) * rows + slot;
  const Column<T, true> x(args, first_row, slab.slots, channel, kSize);
  T* out = static_cast<T*>(args.out) + first_row * all_channels(args) + channel;

  for (int i = tid; i < tables * slab.channels; i += kThreads)
    lines[i] = modulated(args, image + i / slab.channels, first + i % slab.channels);
  const Moments<T> own = moments_of(x, mine, [&](int i, const Group<T>& row) {
    if (i < kept) rows_kept[i * kThreads + tid] = *reinterpret_cast<const uint4*>(&row);
  });
  merge<T>(own, slab, rows, slab.cell, [&](int cell, float mean, float squares) {
    const float variance = squares / (float(rows) * float(slab.cell));
    const float inverse = 1.0f / sqrtf(variance + args.eps);
    for (int table = 0; table < tables; ++table)
      for (int c = tid % 32; c < slab.cell; c += 32) {
        Line& line = lines[table * slab.channels + cell * slab.cell + c];
        line = normalised<T>(line, mean, inverse);
      }
  });
  __syncthreads();

  Lines<T> own_lines;
  own_lines.load(lines + column * kSize);
  int row = slot, end = tables > 1 ? int(args.rows) : rows, table = 0;
  const auto write = [&](int i, const Group<T>& vector) {
    if (row >= end) {  // of another image
      for (; row >= end; end += int(args.rows)) ++table;
      own_lines.load(lines + table * slab.channels + column * kSize);
    }
    store_group<true>(out + i * step, own_lines.y(vector, args.silu), kSize);
    row += slab.slots;
  };
  const int here = min(mine, kept);
#pragma unroll 4
  for (int i = 0; i < here; ++i) {
    const uint4 row_kept = rows_kept[i * kThreads + tid];
    write(i, *reinterpret_cast<const Group<T>*>(&row_kept));
  }
  for (int i = here; i < mine; i += kBatch) {
    Group<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = x.load(min(i + j, mine - 1));
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (i + j < mine) write(i + j, batch[j]);
  }
}

// ---- Two launches -------------------------------------------------------------------------------

// Of each cell of each set, (mean, centred squares) of every chunk.
struct Chunks {
  float2* partial;
  int rows, count;  // of a chunk; chunks
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_kernel(const GroupNormSiluArgs args, const Slab slab, const Chunks chunks) {
  wait_for_inputs();
  const int64_t width = all_channels(args) / args.groups, set_rows = args.rows * args.num_frames;
  const int column = int(threadIdx.x) % slab.columns, slot = int(threadIdx.x) / slab.columns;
  const int index = int(blockIdx.x) % slab.count;
  const int64_t chunk = blockIdx.x / slab.count % chunks.count;
  const int64_t set = blockIdx.x / slab.count / chunks.count;
  const int rows = int(min(int64_t(chunks.rows), set_rows - chunk * chunks.rows));
  const int cell = cell_channels(slab, slab.pieces == 1 ? 0 : index % slab.pieces, width);
  const int in_slab = slab.pieces == 1 ? slab.channels : cell;
  const int count = in_slab - column * Group<T>::kSize;
  const int64_t row = set * set_rows + chunk * chunks.rows + slot;
  const int64_t channel = first_channel(slab, index, width) + column * Group<T>::kSize;
  const Column<T, kVector> x(args, row, slab.slots, channel, count);

  const int mine = count > 0 ? rows_of(slot, rows, slab.slots) : 0;
  const auto forget = [](int, const Group<T>&) {};
  const Moments<T> own = moments_of(x, mine, forget);
  const int in_set = int(args.groups) * slab.pieces;
  const int first_cell = slab.pieces == 1 ? index * (slab.channels / slab.cell) : index;
  merge<T>(own, slab, rows, cell, [&](int i, float mean, float squares) {
    if (threadIdx.x % 32 == 0)
      chunks.partial[(set * in_set + first_cell + i) * chunks.count + chunk] =
          make_float2(mean, squares);
  });
}

// Mean and 1 / deviation of a group, in all lanes of a warp.
__device__ __forceinline__ float2 statistics_of(const GroupNormSiluArgs& args, const Slab& slab,
                                                const Chunks& chunks, int64_t set, int group) {
  const int64_t width = all_channels(args) / args.groups, set_rows = args.rows * args.num_frames;
  const float2* partial = chunks.partial + (set * args.groups + group) * slab.pieces * chunks.count;
  const auto entries = [&](const auto& body) {
    for (int piece = 0; piece < slab.pieces; ++piece) {
      const float channels = float(cell_channels(slab, piece, width));
#pragma unroll 4
      for (int chunk = int(threadIdx.x) % 32; chunk < chunks.count; chunk += 32) {
        const int64_t rest = set_rows - int64_t(chunk) * chunks.rows;
        body(partial[piece * chunks.count + chunk],
             float(min(rest, int64_t(chunks.rows))) * channels);
      }
    }
  };
  const float origin = partial[0].x, size = float(set_rows) * float(width);
  float apart = 0.0f, total = 0.0f;
  entries([&](float2 entry, float n) { apart = fmaf(n, entry.x - origin, apart); });
  apart = warp_sum(apart) / size;
  entries([&](float2 entry, float n) {
    const float from_mean = entry.x - origin - apart;
    total += fmaf(n * from_mean, from_mean, entry.y);
  });
  return make_float2(origin + apart, 1.0f / sqrtf(warp_sum(total) / size + args.eps));
}

// Of apply_kernel: rows of one image, and some columns of them.
struct Tiles {
  int columns, across;  // of a block; blocks side by side
  int rows, in_image;   // of a block; blocks one below the other
};

// Blocks go backwards: what chunk_kernel read last is still in L2.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    apply_kernel(const GroupNormSiluArgs args, const Slab slab, const Chunks chunks,
                 const Tiles tiles) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize, kChannels = kApplyBytes / int(sizeof(T));
  VF_SHARED(Line, lines, kChannels);
  const int tid = int(threadIdx.x), slot = tid / tiles.columns, column = tid % tiles.columns;
  const int slots = kThreads / tiles.columns, block = int(gridDim.x - 1 - blockIdx.x);
  const int64_t first = int64_t(block % tiles.across) * tiles.columns * kSize;
  const int row_tile = block / tiles.across, image = row_tile / tiles.in_image;
  const int64_t first_row = int64_t(row_tile % tiles.in_image) * tiles.rows;
  const int rows = int(min(int64_t(tiles.rows), args.rows - first_row));

  const int width = int(all_channels(args) / args.groups);
  const int64_t last = min(first + tiles.columns * kSize, all_channels(args));
  for (int group = int(first / width) + tid / 32; int64_t(group) * width < last; group += kWarps) {
    const float2 of_group = statistics_of(args, slab, chunks, image / int(args.num_frames), group);
    const int64_t begin = max(first, int64_t(group) * width);
    const int64_t end = min(last, int64_t(group + 1) * width);
    for (int64_t c = begin + tid % 32; c < end; c += 32)
      lines[c - first] = normalised<T>(modulated(args, image, c), of_group.x, of_group.y);
  }
  __syncthreads();

  const int64_t channel = first + column * kSize;
  const int count = int(all_channels(args) - channel);
  if (slot >= slots || count <= 0) return;
  Lines<T> own_lines;
  own_lines.load(lines + column * kSize);
  const int64_t own_row = image * args.rows + first_row + slot;
  const int step = slots * int(all_channels(args));
  const Column<T, kVector> x(args, own_row, slots, channel, count);
  T* out = static_cast<T*>(args.out) + own_row * all_channels(args) + channel;
  const int mine = rows_of(slot, rows, slots);
  for (int i = 0; i < mine; i += kBatch) {
    Group<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = x.load(min(i + j, mine - 1));
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (i + j < mine)
        store_group<kVector>(out + int64_t(i + j) * step, own_lines.y(batch[j], args.silu), count);
  }
}

// ---- Launches -----------------------------------------------------------------------------------

// By shape alone. One launch where a block is soon done with its slab, or slabs are enough to keep
// half an H100's processors busy and what shared memory does not hold of them stays in L2.
inline bool one_launch(const GroupNormSiluArgs& args, const Slab& slab, int tables, int bytes) {
  constexpr int64_t kSoon = 128 << 10, kInCache = 512 << 10, kEnough = 64;
  if (slab.pieces > 1 || tables * slab.channels > kTable) return false;
  const int64_t in_slab = args.rows * args.num_frames * slab.channels * bytes;
  const int64_t slabs = args.images / args.num_frames * slab.count;
  return in_slab <= kSoon || (slabs >= kEnough && in_slab <= kInCache);
}

// Rows of a thread that a block keeps: so many that a processor holds two blocks, one of which
// reads while the other writes, unless that would be too few.
inline int rows_to_keep(int rows, int device) {
  constexpr int kRow = kThreads * 16, kElse = 30 << 10;  // bytes; of merge() and the table
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int shared = std::max(0, (processor / 2 - 1024 - kElse) / kRow);
  if (rows <= shared + shared / 2) return std::min(rows, shared);
  return std::min(rows, (attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kElse) / kRow);
}

template <class T>
void launch_slabs(const GroupNormSiluArgs& args, const Slab& slab, int tables, int device,
                  void* stream) {
  const int64_t rows = args.rows * args.num_frames, sets = args.images / args.num_frames;
  const int kept = rows_to_keep(int((rows + slab.slots - 1) / slab.slots), device);
  const int bytes = kept * kThreads * 16;
  cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(slab_kernel<T>),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute");
  VF_LAUNCH_DYNAMIC((slab_kernel<T>), dim3(unsigned(sets * slab.count)), dim3(kThreads), bytes,
                    stream, args, slab, kept, tables);
}

template <class T, bool kVector>
void launch_chunks(const GroupNormSiluArgs& args, void* stream) {
  constexpr int kSize = Group<T>::kSize, kChannels = kApplyBytes / int(sizeof(T));
  const Slab slab = make_slab(args, kSize, kVector ? kSize : 1, kChannels);
  const int64_t sets = args.images / args.num_frames, set_rows = args.rows * args.num_frames;
  // As many blocks as the chunks that the workspace has room for.
  const int64_t chunk_rows = std::min(args.chunk_rows * slab.count, set_rows);
  const Chunks chunks{reinterpret_cast<float2*>(args.workspace), int(chunk_rows),
                      int((set_rows + chunk_rows - 1) / chunk_rows)};
  VF_LAUNCH((chunk_kernel<T, kVector>), dim3(unsigned(sets * chunks.count * slab.count)),
            dim3(kThreads), stream, args, slab, chunks);

  const int64_t channels = all_channels(args);
  const int columns = int(std::min<int64_t>(kChannels, channels) + kSize - 1) / kSize;
  Tiles tiles{columns, int((channels + columns * kSize - 1) / (columns * kSize))};
  const auto set_rows_a_thread = [&](int rows) {
    tiles.rows = kThreads / columns * rows;
    tiles.in_image = int((args.rows + tiles.rows - 1) / tiles.rows);
    return args.images * tiles.in_image * tiles.across;
  };
  // Many rows a thread, for what a block does before it begins; enough blocks to fill a large GPU.
  int rows = 8 * kBatch;
  while (set_rows_a_thread(rows) < 1024 && rows > kBatch) rows /= 2;
  VF_LAUNCH((apply_kernel<T, kVector>), dim3(unsigned(args.images * tiles.in_image * tiles.across)),
            dim3(kThreads), stream, args, slab, chunks, tiles);
}

template <class T>
void launch(const GroupNormSiluArgs& args, int device, void* stream) {
  constexpr int kSize = Group<T>::kSize;
  const int64_t width = all_channels(args) / args.groups;
  // Slabs must begin and end with a vector, and so must x and x2.
  bool vectors = args.channels % kSize == 0 && args.channels2 % kSize == 0 &&
                 (width % kSize == 0 || std::lcm(width, int64_t(kSize)) <= kThreads * kSize);
  for (const void* address : {args.x, args.x2, static_cast<const void*>(args.out)})
    vectors = vectors && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  const Slab slab = make_slab(args, kSize, kSize, 32 / int(sizeof(T)));  // a sector of memory
  const bool one_table = !args.scale || args.modulation_images % args.num_frames == 0;
  const int tables = one_table ? 1 : int(args.num_frames);
  if (!vectors)
    launch_chunks<T, false>(args, stream);
  else if (one_launch(args, slab, tables, sizeof(T)))
    launch_slabs<T>(args, slab, tables, device, stream);
  else
    launch_chunks<T, true>(args, stream);
  cuda_check(cudaGetLastError(), "group_norm_silu");
}

}  // namespace

void group_norm_silu_cuda(const GroupNormSiluArgs& given, int device, void* stream) {
  const DeviceGuard guard(device);
  GroupNormSiluArgs args = given;
  args.modulation_images = std::max<int64_t>(1, args.modulation_images);
  if (args.dtype == DType::f32)
    launch<float>(args, device, stream);
  else if (args.dtype == DType::f16)
    launch<__half>(args, device, stream);
  else
    launch<__nv_bfloat16>(args, device, stream);
}

}  // namespace vf
