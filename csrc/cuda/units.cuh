// What the forward and the backward kernels share: which unit a group of lanes computes, and its attention weights.
#pragma once

#include "common.cuh"

namespace msda::cuda {
namespace {

constexpr int kBand = 8;  // rows of pixels, see query_of

// The query at a position in the order in which blocks process them. The queries of an encoder are the pixels: they are
// processed in bands of rows, column by column, so that those of a block are close together.
__device__ __forceinline__ int32_t query_of(const Problem& p, int32_t position) {
  if (p.queries != p.keys) return position;
  const int32_t queries = static_cast<int32_t>(p.queries);
  int32_t start = 0;
  for (int32_t level = 0; level < p.levels; ++level) {
    const Level shape = level_of(p, level);
    const int32_t area = shape.height * shape.width;
    if (area > queries - start) break;
    if (position < start + area) {
      // Unsigned, because a division of signed numbers takes twice the instructions.
      const unsigned height = shape.height, width = shape.width, offset = position - start;
      const unsigned first_row = offset / (kBand * width) * kBand;
      const unsigned rows = height - first_row < kBand ? height - first_row : kBand;
      const unsigned i = offset - first_row * width, column = i / rows;
      return start + static_cast<int32_t>((first_row + i - column * rows) * width + column);
    }
    start += area;
  }
  return position;
}

// The unit of a lane. A block has units of the head blockIdx.y, and of the image blockIdx.z after `first_image`.
struct Unit {
  int32_t first_image, query;
  bool valid;

  __device__ __forceinline__ Unit(const Problem& p, int32_t first_image)
      : Unit(p, first_image, blockIdx.x * blockDim.y + threadIdx.y) {}
  __device__ __forceinline__ Unit(const Problem& p, int32_t first_image, unsigned position) : first_image(first_image) {
    valid = position < p.queries;
    query = valid ? query_of(p, position) : 0;
  }
  __device__ __forceinline__ Unit(int32_t first_image, int32_t query, bool valid)
      : first_image(first_image), query(query), valid(valid) {}

  __device__ __forceinline__ int32_t image() const { return first_image + static_cast<int32_t>(blockIdx.z); }
  __device__ __forceinline__ int32_t head() const { return static_cast<int32_t>(blockIdx.y); }

  // Positions in the tensors: of (image, query), and of (image, query, head).
  __device__ __forceinline__ int64_t row(const Problem& p) const { return image() * p.queries + query; }
  __device__ __forceinline__ int64_t index(const Problem& p) const { return row(p) * p.heads + head(); }

  // The first element of the unit's head in (image, key, head, channel).
  __device__ __forceinline__ int64_t base(const Problem& p) const {
    return (image() * p.keys * p.heads + head()) * p.channels;
  }
};

// The attention weights of a unit: the softmax of its logits, or the given weights.
template <class A, class C>
struct Attention {
  const C* source;
  A largest = 0, scale = 1;
  bool softmax;

  __device__ Attention(const Problem& p, const Unit& unit, int lanes)
      : source(static_cast<const C*>(p.weights) + unit.index(p) * p.samples()), softmax(p.reference_size != 0) {
    if (!softmax) return;
    const int count = unit.valid ? static_cast<int>(p.samples()) : 0;
    largest = -INFINITY;
    for (int s = threadIdx.x; s < count; s += lanes) {
      const A logit = widen<A>(source[s]);
      largest = logit > largest ? logit : largest;
    }
    largest = group_max(largest, lanes);
    A sum = 0;
    for (int s = threadIdx.x; s < count; s += lanes) sum += exponential(widen<A>(source[s]) - largest);
    scale = reciprocal(group_sum(sum, lanes));
  }

  __device__ __forceinline__ A operator()(int s) const {
    const A x = widen<A>(source[s]);
    return softmax ? exponential(x - largest) * scale : x;
  }
};

}  // namespace
}  // namespace msda::cuda
