// Tensor cores: products of 16-bit matrices, summed in float.
#pragma once

#include "common.cuh"

namespace msda::cuda {
namespace {

// sum += a * b, with the fragments of mma.m16n8k16. Without the instruction, lanes ask each other for the numbers: in
// tests on a CPU, and where a newer device runs code for an older one.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define MSDA_MMA(type)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>)
    MSDA_MMA("f16");
  else
    MSDA_MMA("bf16");
#undef MSDA_MMA
#else
  const auto element = [](uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    T x;
    std::memcpy(&x, &bits, sizeof(x));
    return widen<float>(x);
  };
  const int lane = (threadIdx.y * blockDim.x + threadIdx.x) & 31, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int holder = i % 4;        // t of the lanes that hold two columns of a, and two rows of b
    const bool second = i / 4 != 0;  // in the second of their words
    const uint32_t row[2] = {__shfl_sync(kAllLanes, second ? a[2] : a[0], 4 * g + holder),
                             __shfl_sync(kAllLanes, second ? a[3] : a[1], 4 * g + holder)};
    const uint32_t column[2] = {__shfl_sync(kAllLanes, second ? b[1] : b[0], 8 * t + holder),
                                __shfl_sync(kAllLanes, second ? b[1] : b[0], 8 * t + 4 + holder)};
    for (int j = 0; j < 4; ++j)
      sum[j] += element(row[j / 2], 0) * element(column[j % 2], 0) + element(row[j / 2], 1) * element(column[j % 2], 1);
  }
#endif
}

}  // namespace
}  // namespace msda::cuda
