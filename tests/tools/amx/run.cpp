// The kernels of the instruction set amx against those of amx_emulated, bit for bit, over random
// products and attentions. Both are built with the same other features, so that only
// their tiles differ. Without AMX its instructions are emulated (instructions.h); with AMX they
// run.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/half.h"
#include "instructions.h"
#include "ops.h"

namespace vf {
#define VF_DECLARE(name, Args) void name##_cpu(const Args& args, int64_t threads);
#define VF_OPS(OP)                            \
  OP(row_matmul, RowMatmulArgs)               \
  OP(pack_weights, PackWeightsArgs)           \
  OP(spatial_attention, SpatialAttentionArgs) \
  OP(temporal_attention, TemporalAttentionArgs)
namespace amx {
VF_OPS(VF_DECLARE)
int64_t packed_words(int64_t columns, int64_t depth, bool geglu, DType dtype);
}  // namespace amx
namespace amx_emulated {
VF_OPS(VF_DECLARE)
}
}  // namespace vf

namespace {

std::mt19937 random_bits(5);

int between(int low, int high) { return low + int(random_bits() % unsigned(high - low + 1)); }

// Numbers of every size, denormals and zeros among them, or of a size that a network has.
std::vector<vf::BFloat16> numbers(size_t count, bool wild) {
  std::vector<vf::BFloat16> out(count);
  std::normal_distribution<float> normal;
  for (auto& x : out) {
    const float value = normal(random_bits) * 0.2f;
    uint32_t bits = vf::float_to_bits(value) >> 16;
    if (wild && random_bits() % 4 == 0) bits = random_bits() & 0x80ffu;  // near and below 2^-126
    x.bits = uint16_t(bits);
  }
  return out;
}

std::vector<float> floats(size_t count) {
  std::vector<float> out(count);
  std::normal_distribution<float> normal;
  for (auto& x : out) x = normal(random_bits);
  return out;
}

int cases = 0;

// run(amx?, out) twice into memory of `count` numbers.
template <class Run>
void compare(const std::string& what, size_t count, const Run& run) {
  std::vector<vf::BFloat16> out[2];
  for (int i = 0; i < 2; ++i) {
    out[i].assign(count, vf::BFloat16{0x7fc1});
    run(i == 0, out[i].data());
  }
  ++cases;
  if (std::memcmp(out[0].data(), out[1].data(), count * sizeof(vf::BFloat16)) == 0) return;
  size_t at = 0;
  while (out[0][at].bits == out[1][at].bits) ++at;
  std::printf("%s: element %zu is %04x on amx and %04x emulated\n", what.c_str(), at,
              unsigned(out[0][at].bits), unsigned(out[1][at].bits));
  std::exit(1);
}

void products(int rows, int width, int taps, int columns, bool geglu, bool wild) {
  const int depth = taps * width;
  const auto x = numbers(size_t(rows) * width, wild);
  const auto weights = numbers(size_t(geglu ? 2 : 1) * columns * depth, wild);
  const auto bias = floats((geglu ? 2 : 1) * columns);
  const auto residual = numbers(size_t(rows) * columns, wild);
  std::vector<int32_t> table(taps * rows);
  for (auto& from : table) from = between(-1, rows - 1);
  for (int i = 0; i < rows && between(0, 1); ++i) table[i] = i;  // a stretch that follows itself
  std::vector<uint32_t> packed(vf::amx::packed_words(columns, depth, geglu, vf::DType::bf16));
  vf::PackWeightsArgs pack{};
  pack.weights = weights.data();
  pack.out = packed.data();
  pack.columns = columns;
  pack.depth = depth;
  pack.geglu = geglu;
  pack.dtype = vf::DType::bf16;
  vf::amx::pack_weights_cpu(pack, 1);
  vf::RowMatmulArgs a{};
  a.sources.count = 1;
  a.sources.at[0] = {x.data(), width, width, taps > 1 ? table.data() : nullptr, taps, rows};
  a.weights = packed.data();
  a.bias = bias.data();
  a.residual = residual.data();
  a.residual_stride = a.out_stride = a.columns = columns;
  a.rows = a.item_rows = rows;
  a.epilogue = geglu ? vf::Epilogue::geglu : vf::Epilogue::none;
  a.dtype = vf::DType::bf16;
  const std::string what = "row_matmul " + std::to_string(rows) + "x" + std::to_string(taps) + "x" +
                           std::to_string(width) + "x" + std::to_string(columns);
  compare(what, size_t(rows) * columns, [&](bool amx, vf::BFloat16* out) {
    a.out = out;
    amx ? vf::amx::row_matmul_cpu(a, 1) : vf::amx_emulated::row_matmul_cpu(a, 1);
  });
}

void attention_in_space(int q_len, int k_len, int heads, int dim) {
  const int width = heads * dim;
  const auto q = numbers(size_t(q_len) * width, false), k = numbers(size_t(k_len) * width, false),
             v = numbers(size_t(k_len) * width, false);
  vf::SpatialAttentionArgs a{};
  a.q = q.data();
  a.k = k.data();
  a.v = v.data();
  a.frames = a.kv_frames = 1;
  a.q_len = q_len;
  a.k_len = k_len;
  a.heads = heads;
  a.head_dim = dim;
  a.q_stride = a.kv_stride = width;
  a.dtype = vf::DType::bf16;
  compare("spatial_attention", q.size(), [&](bool amx, vf::BFloat16* out) {
    a.out = out;
    amx ? vf::amx::spatial_attention_cpu(a, 1) : vf::amx_emulated::spatial_attention_cpu(a, 1);
  });
}

void attention_in_time(int frames, int pixels, int heads, int dim, bool biased) {
  const auto qkv = numbers(size_t(3) * frames * pixels * heads * dim, false);
  const auto bias = floats(size_t(heads) * frames * frames);
  vf::TemporalAttentionArgs a{};
  a.qkv = qkv.data();
  a.bias = biased ? bias.data() : nullptr;
  a.batch = 1;
  a.frames = frames;
  a.pixels = pixels;
  a.heads = heads;
  a.head_dim = dim;
  a.dtype = vf::DType::bf16;
  compare("temporal_attention", qkv.size() / 3, [&](bool amx, vf::BFloat16* out) {
    a.out = out;
    amx ? vf::amx::temporal_attention_cpu(a, 1) : vf::amx_emulated::temporal_attention_cpu(a, 1);
  });
}

}  // namespace

int main() {
  const bool hardware =
      __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023L, 18L) == 0;
  if (!hardware) amx::emulate();
  for (const bool wild : {false, true}) {
    products(1, 34, 1, 40, false, wild);
    products(33, 64, 1, 64, false, wild);
    products(70, 32, 9, 48, false, wild);
    products(40, 20, 3, 17, false, wild);
    products(50, 64, 1, 40, true, wild);
    products(2, 2080, 1, 16, false, wild);
  }
  for (int i = 0; i < 20; ++i)
    products(between(1, 100), 2 * between(1, 50), between(1, 9), between(1, 130), i % 3 == 0,
             i % 2 == 0);
  attention_in_space(40, 150, 2, 32);
  attention_in_space(7, 3, 1, 8);
  attention_in_space(33, 40, 1, 72);
  attention_in_time(16, 2, 2, 32, true);
  attention_in_time(5, 3, 1, 24, false);
  attention_in_time(33, 1, 1, 64, true);
  if (amx::state().configured) {
    std::printf("a kernel kept its tiles\n");
    return 1;
  }
  std::printf("%d cases, %s", cases, hardware ? "amx instructions\n" : "emulated: ");
  if (!hardware) std::printf("%ld instructions\n", long(amx::executed));
  return !hardware && amx::executed == 0;
}
