// Element types as the numbers that cross from Python (vfengine/ops/_dispatch.py).
#pragma once

namespace vf {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, words = 3 };  // words: raw 32-bit integers

}  // namespace vf
