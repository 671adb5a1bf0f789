// The gradient of the value, summed by atomics. An atomic is the most expensive operation of the backward pass, and the
// samples of a block share most of their pixels: their rows are first brought into an order in which equal keys are
// adjacent, by a counting sort over a hash table in shared memory. Groups of lanes then sum equal keys in registers,
// and each distinct row is added to memory once, or twice where it is divided among two groups.
#pragma once

#include "common.cuh"

namespace msda::cuda {
namespace {

constexpr int kCorners = 4;
constexpr int kSlots = 2 * kCorners;  // of the hash table, per thread: at most half are taken

// A row of one corner: `weight` times the gradient of the output of a unit of the block. The upper half of `place` is
// the slot of its key, and the lower half the offset of the gradient in bytes.
template <class A>
struct alignas(2 * sizeof(A)) Row {
  A weight;
  uint32_t place;
};

// Per thread of a block whose size is a power of two: the rows of one sample.
template <class T, int N>
class BlockSums {
  using A = typename AccumulatorOf<T>::type;

 public:
  // Of shared memory; a multiple of 32.
  MSDA_MEMBER static constexpr int bytes(int threads) {
    return threads * static_cast<int>(sizeof(Row<A>) * kCorners + sizeof(Pack<T, N>) + 2 * kSlots * sizeof(int32_t)) +
           32;
  }

  __device__ __forceinline__ explicit BlockSums(unsigned char* memory)
      : thread(threadIdx.y * blockDim.x + threadIdx.x), threads(blockDim.x * blockDim.y) {
    keys = reinterpret_cast<int32_t*>(memory);
    counts = keys + kSlots * threads;
    rows = reinterpret_cast<Row<A>*>(counts + kSlots * threads);
    grads = reinterpret_cast<Pack<T, N>*>(rows + kCorners * threads);
    total = reinterpret_cast<int32_t*>(grads + threads);
  }

  // Adds the rows of one sample per thread. Called by all threads of the block, which then are at a barrier. Bit i of
  // `corners` says whether row i exists. grad_output is that of the thread's unit, and grad_value begins at the first
  // key of the block's image and head.
  __device__ __forceinline__ void add(unsigned corners, const int32_t (&key)[kCorners], const A (&weight)[kCorners],
                                      const T* grad_output, A* grad_value, int channels, int32_t row_bytes) {
    clear();
    __syncthreads();
    uint32_t entry[kCorners] = {};  // the slot, and in the lower half the number of earlier rows in it
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      if ((corners >> i & 1) != 0) {
        const uint32_t slot = slot_of(key[i]);
        entry[i] = slot << 16 | static_cast<uint32_t>(atomicAdd(counts + slot, 1));
      }
    }
    __syncthreads();
    reserve();
    __syncthreads();
    const uint32_t gradient = (thread - threadIdx.x) * static_cast<uint32_t>(sizeof(Pack<T, N>));
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      const uint32_t slot = entry[i] >> 16;
      if ((corners >> i & 1) != 0) rows[counts[slot] + (entry[i] & 0xffff)] = {weight[i], slot << 16 | gradient};
    }
    for (int first = 0; first < channels; first += blockDim.x * N) {
      const int c = first + threadIdx.x * N;
      if (first != 0) __syncthreads();
      if (c < channels) grads[thread] = *reinterpret_cast<const Pack<T, N>*>(grad_output + c);
      __syncthreads();
      if (c < channels) sum(grad_value + c, row_bytes);
    }
    __syncthreads();
  }

 private:
  // The slots of a thread are in parts of four, so that the threads of a warp use different banks.
  __device__ __forceinline__ int part(int i) const { return 4 * (i * threads + thread); }

  __device__ __forceinline__ void clear() {
    const int32_t free[4] = {-1, -1, -1, -1}, zeros[4] = {};
#pragma unroll
    for (int i = 0; i < kSlots / 4; ++i) {
      store(keys + part(i), free);
      store(counts + part(i), zeros);
    }
    if (thread == 0) *total = 0;
  }

  // The slot of a key, which is entered if it is new.
  __device__ __forceinline__ uint32_t slot_of(int32_t key) {
    const unsigned slots = kSlots * threads;
    unsigned slot = (static_cast<unsigned>(key) * 2654435769u) >> (__clz(slots) + 1);  // Fibonacci hashing
    for (;; slot = (slot + 1) & (slots - 1)) {
      const int32_t found = atomicCAS(keys + slot, -1, key);
      if (found == -1 || found == key) return slot;
    }
  }

  // Gives each slot a range of the rows: its count becomes the first row of the range. The ranges have any order.
  __device__ __forceinline__ void reserve() {
    int32_t count[kSlots / 4][4], sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i % 4 == 0) load(counts + part(i / 4), count[i / 4]);
      const int32_t own = count[i / 4][i % 4];
      count[i / 4][i % 4] = sum;
      sum += own;
    }
    const int lane = thread % 32;
    int32_t before = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    int32_t first = 0;
    if (lane == 31) first = atomicAdd(total, before);
    first = __shfl_sync(kAllLanes, first, 31) + before - sum;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      count[i / 4][i % 4] += first;
      if (i % 4 == 3) store(counts + part(i / 4), count[i / 4]);
    }
  }

  // Each group sums an equal share of the rows.
  __device__ __forceinline__ void sum(A* grad_value, int32_t row_bytes) {
    const int share = (*total + blockDim.y - 1) / blockDim.y, begin = threadIdx.y * share;
    const int end = begin + share < *total ? begin + share : *total;
    if (begin >= end) return;
    const auto* const own = reinterpret_cast<const unsigned char*>(grads + threadIdx.x);
    A x[N] = {};
    uint32_t place = rows[begin].place;
#pragma unroll 2
    for (int i = begin; i < end; ++i) {
      const Row<A> row = rows[i];
      if ((row.place ^ place) >> 16 != 0) {
        atomic_add<N>(row_at(grad_value, keys[place >> 16], row_bytes), x);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = 0;
      }
      place = row.place;
      A grad[N];
      load(reinterpret_cast<const T*>(own + (place & 0xffff)), grad);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += row.weight * grad[j];
    }
    atomic_add<N>(row_at(grad_value, keys[place >> 16], row_bytes), x);
  }

  int thread, threads;
  int32_t *keys, *counts;  // of the slots; a free slot has key -1
  Row<A>* rows;
  Pack<T, N>* grads;
  int32_t* total;
};

}  // namespace
}  // namespace msda::cuda
