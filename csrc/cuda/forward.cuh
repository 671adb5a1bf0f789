// The forward kernel for all types. The lanes of a group plan samples in parallel: the keys and weights of their
// corners. Then each lane sums its channels over the samples. See tensor_core_forward.cuh for the other one.
#pragma once

#include "units.cuh"

namespace msda::cuda {
namespace {

template <class T>
constexpr int kForwardThreads = sizeof(T) == 2 ? 256 : 512;  // 64 units of 32 channels
template <class T>
constexpr int kForwardBlocks = sizeof(T) == 2 ? 3 : 8 / sizeof(T);  // at least, on a multiprocessor

constexpr int kChunk = 16;  // maximum number of samples of a unit that are planned at a time

MSDA_INLINE int chunk_of(const Problem& p) { return static_cast<int>(p.samples() < kChunk ? p.samples() : kChunk); }

// The corners of a sample: the pixels that are read. Where one does not exist, its neighbor is there a second time, and
// each of the two has half of the weight: a weight of 0 would turn an infinite value into NaN.
template <class A>
struct PlannedSample {
  Pack<int32_t, 4> key;
  Pack<A, 4> weight;
};

template <class A>
__device__ __forceinline__ PlannedSample<A> planned(const Cell<A, int32_t>& cell, const Level& shape, A weight) {
  const int32_t bottom = shape.height - 1, edge = shape.width - 1;
  const bool above = cell.row >= 0, below = cell.row < bottom, before = cell.column >= 0, after = cell.column < edge;
  const int32_t row[2] = {above ? cell.row : 0, below ? cell.row + 1 : bottom};
  const int32_t column[2] = {before ? cell.column : 0, after ? cell.column + 1 : edge};
  const A up = weight * (above ? (A(1) - cell.down) * (below ? A(1) : A(0.5)) : cell.down * A(0.5));
  const A down = weight * (below ? cell.down * (above ? A(1) : A(0.5)) : (A(1) - cell.down) * A(0.5));
  const A left = before ? (A(1) - cell.right) * (after ? A(1) : A(0.5)) : cell.right * A(0.5);
  const A right = after ? cell.right * (before ? A(1) : A(0.5)) : (A(1) - cell.right) * A(0.5);
  const int32_t first = shape.start + row[0] * shape.width, second = shape.start + row[1] * shape.width;
  return {{first + column[0], first + column[1], second + column[0], second + column[1]},
          {up * left, up * right, down * left, down * right}};
}

// Plans samples [first, first + count) of the group's unit: calls put(i, exists, sample) for each i, and for further
// ones that do not exist, so that each lane calls it as often. A sample without corners does not exist.
template <class A, class C, class Put>
__device__ __forceinline__ void plan(const Problem& p, const Unit& unit, const Attention<A, C>& attention, int first,
                                     int count, const Put& put) {
  const int lanes = blockDim.x;
  int level = static_cast<int>(p.level_of(first));
  for (int i = threadIdx.x; i < count + static_cast<int>(threadIdx.x); i += lanes) {
    PlannedSample<A> sample;
    bool exists = false;
    if (unit.valid && i < count) {
      const int s = first + i;
      while (s >= static_cast<int>(p.first_sample(level + 1))) ++level;
      A weight = attention(s);
      const Level shape = level_of(p, level);
      const Cell<A, int32_t> cell = cell_of<A, C>(p, unit.row(p), unit.index(p) * p.samples() + s, level, shape);
      compute_now(weight);  // so that its load overlaps with those of the cell
      exists = any_exists(cell.row, shape);
      if (exists) sample = planned(cell, shape, weight);
    }
    put(i, exists, sample);
  }
}

// Plans samples without those that have no corner, and returns the number of the others.
template <class A, class C>
__device__ __forceinline__ int plan_existing(const Problem& p, const Unit& unit, const Attention<A, C>& attention,
                                             int first, int count, PlannedSample<A>* samples) {
  const int lanes = blockDim.x, begin = (threadIdx.y * lanes & 31), lane = begin + threadIdx.x;
  const unsigned earlier = ((1u << lane) - 1) & (kAllLanes << begin);
  const unsigned group = (lanes == 32 ? kAllLanes : (1u << lanes) - 1) << begin;
  int number = 0;
  plan(p, unit, attention, first, count, [&](int, bool exists, const PlannedSample<A>& sample) {
    const unsigned existing = __ballot_sync(kAllLanes, exists);
    if (exists) samples[number + __popc(existing & earlier)] = sample;
    number += __popc(existing & group);
  });
  return number;
}

template <class T, class C, int N>
__global__ void __launch_bounds__(kForwardThreads<T>, N == 1 ? 1 : kForwardBlocks<T>)
    forward_kernel(const Problem p, int32_t first_image, T* __restrict__ output) {
  using A = typename AccumulatorOf<T>::type;
  // The loads of so many samples are issued before the first of them is used.
  constexpr int kTogether = N <= 4 ? 2 : 1;
  const int lanes = blockDim.x, channels = static_cast<int>(p.channels), all = static_cast<int>(p.samples());
  const Unit unit(p, first_image);
  auto* const samples = reinterpret_cast<PlannedSample<A>*>(shared_memory) + threadIdx.y * (chunk_of(p) + 1);
  const Attention<A, C> attention(p, unit, lanes);
  const T* const rows = static_cast<const T*>(p.value) + unit.base(p);
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));

  for (int c0 = 0; c0 < channels; c0 += lanes * N) {
    const int c = c0 + threadIdx.x * N;
    const bool active = c < channels;
    A sum[N] = {};
    const auto add = [&](const PlannedSample<A>* sample, auto together) {
      constexpr int kSamples = decltype(together)::value;
      A x[kSamples][4][N];
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        const Pack<int32_t, 4> key = sample[k].key;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) load(row_at(rows + c, key.x[corner], row_bytes), x[k][corner]);
      }
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        const Pack<A, 4> weight = sample[k].weight;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += weight.x[corner] * x[k][corner][j];
      }
    };
    for (int first = 0; first < all; first += kChunk) {
      const int count = all - first < kChunk ? all - first : kChunk;
      __syncwarp();
      const int number = plan_existing(p, unit, attention, first, count, samples);
      __syncwarp();
      if (!active) continue;
      int i = 0;
      for (; i + kTogether <= number; i += kTogether) add(samples + i, std::integral_constant<int, kTogether>());
      for (; i < number; ++i) add(samples + i, std::integral_constant<int, 1>());
    }
    if (active && unit.valid) store(output + unit.index(p) * p.channels + c, sum);
  }
}

}  // namespace
}  // namespace msda::cuda
