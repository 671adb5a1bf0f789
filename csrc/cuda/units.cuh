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

// The unit of a lane. `row` counts (image, query) and `index` counts (image, query, head), as in the tensors.
struct Unit {
  int32_t image, query, head;
  int64_t row, index;
  bool valid;
};

// A block has units of the head blockIdx.y, and of the image blockIdx.z after `first_image`.
__device__ __forceinline__ Unit unit_of(const Problem& p, int32_t first_image) {
  const unsigned position = blockIdx.x * blockDim.y + threadIdx.y;
  Unit unit;
  unit.image = first_image + static_cast<int32_t>(blockIdx.z);
  unit.head = static_cast<int32_t>(blockIdx.y);
  unit.valid = position < p.queries;
  unit.query = unit.valid ? query_of(p, position) : 0;
  unit.row = unit.image * p.queries + unit.query;
  unit.index = unit.row * p.heads + unit.head;
  return unit;
}

// The attention weights of a unit: the softmax of its logits, or the given weights.
template <class A, class C>
struct Attention {
  const C* source;
  A largest = 0, scale = 1;
  bool softmax;

  __device__ Attention(const Problem& p, const Unit& unit, int lanes)
      : source(static_cast<const C*>(p.weights) + unit.index * p.samples()), softmax(p.reference_size != 0) {
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
    scale = A(1) / group_sum(sum, lanes);
  }

  __device__ __forceinline__ A operator()(int s) const {
    const A x = widen<A>(source[s]);
    return softmax ? exponential(x - largest) * scale : x;
  }
};

}  // namespace
}  // namespace msda::cuda
