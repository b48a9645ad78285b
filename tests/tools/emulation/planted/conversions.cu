// fp32 from stdin, twice to stdout: through fp16 and through bf16 (tests/cuda/test_emulator.py).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>

int main() {
  float x;
  while (std::fread(&x, sizeof x, 1, stdin) == 1) {
    const float both[] = {__half2float(__float2half_rn(x)),
                          __bfloat162float(__float2bfloat16_rn(x))};
    std::fwrite(both, sizeof both, 1, stdout);
  }
  return 0;
}
