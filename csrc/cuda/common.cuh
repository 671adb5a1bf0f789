// Shared by the CUDA kernels: number types, memory access, reductions over a group of lanes, and samples.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "ms_deform_attn.h"

#ifndef MSDA_EMULATED
#define MSDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define MSDA_CHECK_ALIGNED(pointer, bytes)  // a GPU faults by itself
#endif

namespace msda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGridLimit = 65535;  // blocks of a grid in y and z
constexpr unsigned kAllLanes = 0xffffffffu;

// Whether this is code for compute capability 8.0 or higher, which has tensor cores for bfloat16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kSm80 = false;
#else
constexpr bool kSm80 = true;
#endif

extern __shared__ __align__(32) unsigned char shared_memory[];

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

template <class A, class T>
__device__ __forceinline__ A widen(T x) {
  return static_cast<A>(x);
}
template <>
__device__ __forceinline__ float widen<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float widen<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T, class A>
__device__ __forceinline__ T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// `base` plus `key` rows of `bytes` bytes. One instruction: by itself, the compiler would multiply in 64 bits.
template <class T>
__device__ __forceinline__ T* row_at(T* base, int32_t key, int32_t bytes) {
#ifdef __CUDA_ARCH__
  int64_t offset;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(key), "r"(bytes));
#else
  const int64_t offset = int64_t{key} * bytes;
#endif
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + offset);
}

// Has the compiler compute x here, instead of later, where it may be needed several times or not at all.
__device__ __forceinline__ void compute_now(int64_t& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(x));
#endif
}
__device__ __forceinline__ void compute_now(float& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#endif
}
__device__ __forceinline__ void compute_now(double& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x));
#endif
}

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// A bfloat16 is the upper half of a float: one instruction widens either half of a word.
template <int N, std::enable_if_t<N % 2 == 0, int> = 0>
__device__ __forceinline__ void load(const __nv_bfloat16* source, float (&target)[N]) {
  MSDA_CHECK_ALIGNED(source, sizeof(Pack<uint32_t, N / 2>));
  const auto pack = *reinterpret_cast<const Pack<uint32_t, N / 2>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = float_of(i % 2 ? pack.x[i / 2] & 0xffff0000u : pack.x[i / 2] << 16);
}

template <class A, class T, int N>
__device__ __forceinline__ void load(const T* source, A (&target)[N]) {
  MSDA_CHECK_ALIGNED(source, sizeof(Pack<T, N>));
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = widen<A>(pack.x[i]);
}

template <class T, class A, int N>
__device__ __forceinline__ void store(T* target, const A (&source)[N]) {
  MSDA_CHECK_ALIGNED(target, sizeof(Pack<T, N>));
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.x[i] = narrow<T>(source[i]);
  *reinterpret_cast<Pack<T, N>*>(target) = pack;
}

template <int N, class A>
__device__ __forceinline__ void atomic_add(A* target, const A (&x)[N]) {
  MSDA_CHECK_ALIGNED(target, sizeof(A) == sizeof(float) && N % 4 == 0 ? 16 : sizeof(A));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(A) == sizeof(float) && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      atomicAdd(reinterpret_cast<float4*>(target + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(target + i, x[i]);
  }
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Of a number that is neither tiny nor huge, to two units in the last place: an exact division would call a function.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// Reductions over the `lanes` of a group.
template <class A>
__device__ __forceinline__ A group_sum(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class A>
__device__ __forceinline__ A group_max(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

struct Level {
  int32_t height, width, start;
};

// A level that is not inside the value is empty: the host cannot check the sizes without waiting for the device, and
// wrong ones must not lead outside of the value's memory.
__device__ __forceinline__ Level level_of(const Problem& p, int level) {
  const Level shape = {static_cast<int32_t>(p.spatial_shapes[2 * level]),
                       static_cast<int32_t>(p.spatial_shapes[2 * level + 1]),
                       static_cast<int32_t>(p.level_start_index[level])};
  // Without branches: what is loaded next need not wait for the sizes.
  const bool inside = (shape.height > 0) & (shape.width > 0) & (shape.start >= 0) &
                      (shape.start + int64_t{shape.height} * shape.width <= p.keys);
  return inside ? shape : Level{0, 0, 0};
}

// The reference point of a query on a level: (x, y, w, h), with 0 for absent values. `row` counts (image, query).
template <class A, class C>
__device__ __forceinline__ void load_reference(const Problem& p, int64_t row, int level, A (&reference)[4]) {
  const int64_t first = (row * p.levels + level) * p.reference_size;
  const bool box = p.reference_size == 4;
  const auto load_from = [&](const auto* source) {
    for (int i = 0; i < 4; ++i) reference[i] = i < 2 || box ? widen<A>(source[first + i]) : A(0);
  };
  if (p.wide_reference)
    load_from(static_cast<const A*>(p.reference_points));
  else
    load_from(static_cast<const C*>(p.reference_points));
}

// The cell of one sample; `index` counts (image, query, head, sample).
template <class A, class C>
__device__ __forceinline__ Cell<A, int32_t> cell_of(const Problem& p, int64_t row, int64_t index, int level,
                                                    const Level& shape) {
  const C* source = static_cast<const C*>(p.coordinates) + 2 * index;
  const A x = widen<A>(source[0]), y = widen<A>(source[1]), width = shape.width, height = shape.height;
  if (p.reference_size == 0)
    return locate(pixel_of_location(x, width), pixel_of_location(y, height), shape.height, shape.width);
  A reference[4];
  load_reference<A, C>(p, row, level, reference);
  if (p.reference_size == 2)
    return locate(pixel_of_point(reference[0], x, width), pixel_of_point(reference[1], y, height), shape.height,
                  shape.width);
  const A unit = A(0.5) * reciprocal(static_cast<A>(p.points_on(level)));
  return locate(pixel_of_box(reference[0], reference[2], x, unit, width),
                pixel_of_box(reference[1], reference[3], y, unit, height), shape.height, shape.width);
}

// Whether a cell has any pixel of the level.
__device__ __forceinline__ bool any_exists(int32_t row, const Level& shape) {
  return row >= -1 && shape.height > 0 && shape.width > 0;
}

// What the deterministic gradient of the value needs of a sample. The upper bits of `query` say that the cell begins
// before the first row or column of its level.
template <class A>
struct alignas(4 * sizeof(A)) ValueSample {
  A down, right, weight;  // the place in the cell, and the attention weight
  uint32_t query;
};
constexpr uint32_t kOnlyLower = 1u << 31, kOnlyRight = 1u << 30, kQuery = kOnlyRight - 1;

}  // namespace
}  // namespace msda::cuda
