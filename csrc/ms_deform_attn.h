// Multi-scale deformable attention: the operator's arguments and its arithmetic for one sample, shared by all backends.
// The functions are compiled for the host and for CUDA devices.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define MSDA_MEMBER __host__ __device__ __forceinline__
#else
#define MSDA_MEMBER inline __attribute__((always_inline))
#endif
#define MSDA_INLINE static MSDA_MEMBER

namespace msda {

enum class DType { float64, float32, float16, bfloat16 };

constexpr int kMaxUnevenLevels = 16;

// All tensors are contiguous. A "sample" is one of the positions of one query and head: `points` on each level, or
// another number on each level if `points` is 0.
struct Problem {
  int64_t batch, keys, heads, channels, levels, queries, points;
  int reference_size;  // 0: plain operator; fused: 2 for reference points (x, y), 4 for boxes (cx, cy, w, h)
  DType dtype, coordinate_dtype;
  bool wide_reference;            // whether the reference points have the accumulation type instead of coordinate_dtype
  const void* value;              // (batch, keys, heads, channels), dtype
  const int64_t* spatial_shapes;  // (levels, 2): height, width
  const int64_t* level_start_index;           // (levels)
  const void* reference_points;               // fused: (batch, queries, levels, reference_size)
  const void* coordinates;                    // locations, fused: offsets, (batch, queries, heads, samples, 2)
  const void* weights;                        // weights, fused: logits, (batch, queries, heads, samples)
  int32_t level_begin[kMaxUnevenLevels + 1];  // if points is 0: the first sample of each level, and samples()

  MSDA_MEMBER int64_t samples() const { return first_sample(levels); }
  MSDA_MEMBER int64_t first_sample(int64_t level) const { return points != 0 ? level * points : level_begin[level]; }
  MSDA_MEMBER int64_t points_on(int64_t level) const {
    return points != 0 ? points : level_begin[level + 1] - level_begin[level];
  }
  MSDA_MEMBER int64_t level_of(int64_t sample) const {
    if (points != 0) return static_cast<uint32_t>(sample) / static_cast<uint32_t>(points);
    int64_t level = 0;
    while (sample >= level_begin[level + 1]) ++level;
    return level;
  }
};

// Gradients, each with the shape of its input.
struct Gradients {
  const void* output;  // in: (batch, queries, heads * channels)
  void *value, *reference_points, *coordinates, *weights;
};

// The arithmetic below works on one sample, or on a vector of samples (GCC's vector extension): then A is a vector of
// floats and I a vector of integers. ScalarOf is the type of a vector's elements.
template <class A>
struct ScalarOf {
  using type = A;
};
template <class A>
using Scalar = typename ScalarOf<A>::type;

template <class To, class From>
MSDA_INLINE To convert(From x) {
#ifndef __CUDACC__
  if constexpr (!std::is_arithmetic_v<From>)
    return __builtin_convertvector(x, To);
  else
#endif
    return static_cast<To>(x);
}

// Position in pixels along one axis, 0 at the center of the first pixel. `size` is the level's extent along the axis.
template <class A>
MSDA_INLINE A pixel_of_location(A location, A size) {
  return location * size - Scalar<A>(0.5);
}
template <class A>
MSDA_INLINE A pixel_of_point(A point, A offset, A size) {
  return point * size + offset - Scalar<A>(0.5);
}
template <class A>
MSDA_INLINE A pixel_of_box(A center, A extent, A offset, A unit, A size) {  // unit = 0.5 / points
  return (center + offset * extent * unit) * size - Scalar<A>(0.5);
}

// The 2x2 neighborhood of a position: its first row and column, and the fractions of the way to the next ones. If no
// neighbor is a pixel of the level, or the position is NaN, none of the four exists and the fractions are 0.
template <class A, class I>
struct Cell {
  I row, column;
  A down, right;
};

template <class I, class A>
MSDA_INLINE I floor_to_int(A x) {
  const I truncated = convert<I>(x);
  return x < convert<A>(truncated) ? truncated - 1 : truncated;
}

template <class A, class I>
MSDA_INLINE Cell<A, I> locate(A x, A y, I height, I width) {
  const Scalar<A> first = -1;
  const A outside = A{} - 2;
  const auto inside = (x >= first) & (x < convert<A>(width)) & (y >= first) & (y < convert<A>(height));
  x = inside ? x : outside;
  y = inside ? y : outside;
  Cell<A, I> cell;
  cell.row = floor_to_int<I>(y);
  cell.column = floor_to_int<I>(x);
  cell.down = y - convert<A>(cell.row);
  cell.right = x - convert<A>(cell.column);
  return cell;
}

// The corners in order: (row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1).
template <class A, class I>
MSDA_INLINE auto corner_exists(const Cell<A, I>& cell, int corner, I height, I width) {
  const I row = cell.row + corner / 2, column = cell.column + corner % 2;
  return (row >= 0) & (row < height) & (column >= 0) & (column < width);
}
template <class A, class I>
MSDA_INLINE I corner_key(const Cell<A, I>& cell, int corner, I start, I width) {
  return start + (cell.row + corner / 2) * width + cell.column + corner % 2;
}
template <class A>
MSDA_INLINE A corner_weight(A down, A right, int corner) {
  return (corner / 2 ? down : Scalar<A>(1) - down) * (corner % 2 ? right : Scalar<A>(1) - right);
}

// Gradients of a sample from d[i] = grad_output . corner i (0 for a corner that does not exist), with respect to the
// attention weight and, per unit of attention weight, to the position in pixels.
template <class A>
struct SampleGradient {
  A weight, x, y;
};

template <class A>
MSDA_INLINE SampleGradient<A> sample_gradient(A down, A right, A d0, A d1, A d2, A d3) {
  SampleGradient<A> grad;
  const A top = d0 + right * (d1 - d0), bottom = d2 + right * (d3 - d2);
  grad.weight = top + down * (bottom - top);
  grad.x = (d1 - d0) + down * ((d3 - d2) - (d1 - d0));
  grad.y = bottom - top;
  return grad;
}

}  // namespace msda
