// The gradient of the value, summed by atomics. An atomic is the most expensive operation of the backward pass, and the
// samples of a block share most of their pixels. So pairs of neighboring pixels of a row, of which a sample adds to
// two, are first brought into an order in which equal pairs are adjacent, by a counting sort over a hash table in
// shared memory. Groups of lanes then sum equal pairs in registers. The hash is the pixel's key, so that most pairs are
// followed by that of the next pixel, and each pixel is added to memory about once.
#pragma once

#include "common.cuh"

namespace msda::cuda {
namespace {

constexpr int kPairs = 2;           // of a sample
constexpr int kSlots = 2 * kPairs;  // of the hash table, per thread: at most half are taken
constexpr int32_t kFree = INT32_MIN;

// The pixels `key` and `key` + 1 of one sample, with their weights. Either may not exist.
template <class A>
struct PixelPair {
  int32_t key;
  bool has_left, has_right;
  A left, right;
};

// A pair in order. `place` is the offset in bytes of the gradient of the output of its unit; its two upper bits say
// whether the pixels exist.
template <class A>
struct alignas(sizeof(A) == 4 ? 16 : 8) OrderedPair {
  A left, right;
  int32_t key;
  uint32_t place;
};
constexpr uint32_t kHasLeft = 1u << 30, kHasRight = 1u << 31;

// Per thread of a block whose size is a power of two: the pairs of one sample.
template <class T, int N>
class BlockSums {
  using A = typename AccumulatorOf<T>::type;
  static constexpr int kChannels = N == 8 ? 4 : N;  // of a lane that sums

 public:
  // Of shared memory; a multiple of 32.
  MSDA_MEMBER static constexpr int bytes(int threads) {
    return threads *
               static_cast<int>(sizeof(OrderedPair<A>) * kPairs + sizeof(Pack<T, N>) + 2 * kSlots * sizeof(int32_t)) +
           32;
  }

  __device__ __forceinline__ explicit BlockSums(unsigned char* memory)
      : thread(threadIdx.y * blockDim.x + threadIdx.x), threads(blockDim.x * blockDim.y) {
    keys = reinterpret_cast<int32_t*>(memory);
    counts = keys + kSlots * threads;
    pairs = reinterpret_cast<OrderedPair<A>*>(counts + kSlots * threads);
    grads = reinterpret_cast<Pack<T, N>*>(pairs + kPairs * threads);
    total = reinterpret_cast<int32_t*>(grads + threads);
  }

  // Adds the pairs of one sample per thread. Called by all threads of the block, which then are at a barrier.
  // grad_output is that of the thread's unit, and grad_value begins at the first key of the block's image and head.
  __device__ __forceinline__ void add(const PixelPair<A> (&pair)[kPairs], const T* grad_output, A* grad_value,
                                      int32_t last_key, int channels, int32_t row_bytes) {
    clear();
    __syncthreads();
    uint32_t entry[kPairs] = {};  // the slot, and in the lower half the number of earlier pairs in it
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (pair[i].has_left || pair[i].has_right) {
        const uint32_t slot = slot_of(pair[i].key);
        entry[i] = slot << 16 | static_cast<uint32_t>(atomicAdd(counts + slot, 1));
      }
    }
    __syncthreads();
    reserve();
    __syncthreads();
    const uint32_t gradient = (thread - threadIdx.x) * static_cast<uint32_t>(sizeof(Pack<T, N>));
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t exist = (pair[i].has_left ? kHasLeft : 0) | (pair[i].has_right ? kHasRight : 0);
      if (exist != 0)
        pairs[counts[entry[i] >> 16] + (entry[i] & 0xffff)] = {pair[i].left, pair[i].right, pair[i].key,
                                                               exist | gradient};
    }
    for (int first = 0; first < channels; first += blockDim.x * N) {
      const int c = first + threadIdx.x * N;
      if (first != 0) __syncthreads();
      if (c < channels) grads[thread] = *reinterpret_cast<const Pack<T, N>*>(grad_output + c);
      __syncthreads();
      const int lanes = sum_lanes(), end = first + blockDim.x * N < channels ? first + blockDim.x * N : channels;
      for (int i = 0; i < N / kChannels; ++i) {
        const int own = ((thread & (lanes - 1)) + i * lanes) * kChannels;
        if (first + own < end) sum(own, grad_value + first + own, row_bytes, last_key);
      }
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void clear() {
    const int32_t free[kSlots] = {kFree, kFree, kFree, kFree}, zeros[kSlots] = {};
    store(keys + kSlots * thread, free);
    store(counts + kSlots * thread, zeros);
    if (thread == 0) *total = 0;
  }

  // The slot of a key, which is entered if it is new. A key whose slot is taken goes far away, because the next slots
  // are likely to be taken as well.
  __device__ __forceinline__ uint32_t slot_of(int32_t key) {
    constexpr unsigned kStep = 1181;
    const unsigned mask = kSlots * threads - 1;
    for (unsigned slot = static_cast<unsigned>(key) & mask;; slot = (slot + kStep) & mask) {
      const int32_t found = atomicCAS(keys + slot, kFree, key);
      if (found == kFree || found == key) return slot;
    }
  }

  // Gives each slot a range of the pairs: its count becomes the first pair of the range. The ranges of a warp's slots
  // are in their order.
  __device__ __forceinline__ void reserve() {
    int32_t count[kSlots], sum = 0;
    load(counts + kSlots * thread, count);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int32_t own = count[i];
      count[i] = sum;
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
    for (int i = 0; i < kSlots; ++i) count[i] += first;
    store(counts + kSlots * thread, count);
  }

  // How many lanes of a group sum. If each has fewer channels than it loads, there are fewer groups, and fewer pixels
  // are divided among two.
  __device__ __forceinline__ int sum_lanes() const {
    const int lanes = N / kChannels * blockDim.x;
    return lanes < 32 ? lanes : 32;
  }

  // Each group sums an equal share of the pairs, for the channels from `first` on. To a pixel that does not exist,
  // nothing is added, or zero to the nearest one in memory.
  __device__ __forceinline__ void sum(int first, A* grad_value, int32_t row_bytes, int32_t last_key) {
    const int bits = 31 - __clz(sum_lanes()), group = thread >> bits;  // without divisions
    const int groups = threads >> bits, share = (*total + groups - 1) >> (31 - __clz(groups));
    const int begin = group * share, end = begin + share < *total ? begin + share : *total;
    if (begin >= end) return;
    const auto* const own = reinterpret_cast<const unsigned char*>(grads) + first * sizeof(T);
    A left[kChannels] = {}, right[kChannels] = {};
    int32_t key = pairs[begin].key;
    const auto add_left = [&] { atomic_add<kChannels>(row_at(grad_value, key < 0 ? 0 : key, row_bytes), left); };
    const auto add_right = [&] {
      atomic_add<kChannels>(row_at(grad_value, key < last_key ? key + 1 : last_key, row_bytes), right);
    };
#pragma unroll 2
    for (int i = begin; i < end; ++i) {
      const OrderedPair<A> pair = pairs[i];
      if (pair.key != key) {
        add_left();
        const bool follows = pair.key == key + 1;
        if (!follows) add_right();
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          left[j] = follows ? right[j] : A(0);
          right[j] = 0;
        }
        key = pair.key;
      }
      A grad[kChannels];
      load(reinterpret_cast<const T*>(own + (pair.place & 0xffff)), grad);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if ((pair.place & kHasLeft) != 0) left[j] += pair.left * grad[j];
        if ((pair.place & kHasRight) != 0) right[j] += pair.right * grad[j];
      }
    }
    add_left();
    add_right();
  }

  int thread, threads;
  int32_t *keys, *counts;  // of the slots
  OrderedPair<A>* pairs;
  Pack<T, N>* grads;
  int32_t* total;
};

}  // namespace
}  // namespace msda::cuda
