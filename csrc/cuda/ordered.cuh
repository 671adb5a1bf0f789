// The gradient of the value, summed in a fixed order. The samples of each image and head are sorted by the first pixel
// of their cells with a stable radix sort. A pixel's gradient is then the sum over the samples of four neighboring
// pixels, gathered by one warp: there are no atomics, and every element is written once.
#pragma once

#include <utility>

#include "common.cuh"

namespace msda::cuda {
namespace {

constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kSortWarps = kThreads / 32, kSortRounds = 8, kSortItems = kThreads * kSortRounds;

// Items of all segments (a segment is an image and head), in the order (segment, item); see Scratch::sort.
struct SortBuffers {
  int32_t *keys, *indices;            // (segments, items)
  int32_t *next_keys, *next_indices;  // the same, after a pass
  int32_t* counts;                    // (segments, chunks, digits): of a digit in a chunk
  int32_t* before;                    // the same: of a digit in earlier chunks
  int32_t* smaller;                   // (segments, digits): of smaller digits
  int32_t* begins;                    // (segments, keys + 1): the first item that has this key or a larger one
  int64_t segments;
  int32_t items, chunks;

  SortBuffers(const Problem& p, int32_t* memory)
      : segments(p.batch * p.heads), items(static_cast<int32_t>(p.queries * p.samples())),
        chunks((items + kSortItems - 1) / kSortItems) {
    const auto take = [&](int64_t elements) {
      int32_t* const taken = memory + used;
      used += segments * elements;
      return taken;
    };
    keys = take(items);
    indices = take(items);
    next_keys = take(items);
    next_indices = take(items);
    counts = take(int64_t{chunks} * kDigits);
    before = take(int64_t{chunks} * kDigits);
    smaller = take(kDigits);
    begins = take(p.keys + 1);
  }

  int64_t used = 0;  // elements
};

// The key of every sample: its cell's first pixel, or p.keys if there is none.
template <class A, class C>
__global__ void __launch_bounds__(kThreads) keys_kernel(const Problem p, SortBuffers b) {
  const int32_t segment = blockIdx.x / b.chunks, begin = blockIdx.x % b.chunks * kSortItems;
  const int32_t heads = static_cast<int32_t>(p.heads), image = segment / heads, head = segment % heads;
  const int32_t samples = static_cast<int32_t>(p.samples());
  for (int32_t i = begin + threadIdx.x; i < b.items && i < begin + kSortItems; i += kThreads) {
    const int32_t query = i / samples, s = i % samples, level = static_cast<int32_t>(p.level_of(s));
    const int64_t row = image * p.queries + query;
    const Level shape = level_of(p, level);
    const Cell<A, int32_t> cell = cell_of<A, C>(p, row, (row * heads + head) * samples + s, level, shape);
    const int64_t item = int64_t{segment} * b.items + i;
    b.keys[item] = any_exists(cell.row, shape) ? first_key(cell, shape) : static_cast<int32_t>(p.keys);
    b.indices[item] = i;
  }
}

__device__ __forceinline__ int digit_of(int32_t key, int shift) { return (key >> shift) % kDigits; }

__global__ void __launch_bounds__(kThreads) count_kernel(SortBuffers b, int shift) {
  int32_t* counts = reinterpret_cast<int32_t*>(shared_memory);
  const int32_t segment = blockIdx.x / b.chunks, begin = blockIdx.x % b.chunks * kSortItems;
  counts[threadIdx.x] = 0;
  __syncthreads();
  for (int32_t i = begin + threadIdx.x; i < b.items && i < begin + kSortItems; i += kThreads)
    atomicAdd(&counts[digit_of(b.keys[int64_t{segment} * b.items + i], shift)], 1);
  __syncthreads();
  b.counts[int64_t{blockIdx.x} * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// A block per segment, a thread per digit.
__global__ void __launch_bounds__(kDigits) prefix_kernel(SortBuffers b) {
  int32_t* totals = reinterpret_cast<int32_t*>(shared_memory);
  const int digit = threadIdx.x;
  const int64_t first = int64_t{blockIdx.x} * b.chunks * kDigits + digit;
  const int32_t* __restrict__ counts = b.counts + first;
  int32_t* __restrict__ before = b.before + first;
  int32_t total = 0;
#pragma unroll 8
  for (int32_t chunk = 0; chunk < b.chunks; ++chunk) {
    before[int64_t{chunk} * kDigits] = total;
    total += counts[int64_t{chunk} * kDigits];
  }
  int32_t sum = total;
  for (int step = 1; step < kDigits; step *= 2) {
    totals[digit] = sum;
    __syncthreads();
    if (digit >= step) sum += totals[digit - step];
    __syncthreads();
  }
  b.smaller[int64_t{blockIdx.x} * kDigits + digit] = sum - total;
}

// Moves the items of a chunk to their sorted positions. Each warp ranks its items among equal digits, in order.
__global__ void __launch_bounds__(kThreads) scatter_kernel(SortBuffers b, int shift) {
  int32_t* counts = reinterpret_cast<int32_t*>(shared_memory);  // (warps, digits, and one for lanes without an item)
  const int thread = threadIdx.x, lane = thread % 32;
  const int32_t segment = blockIdx.x / b.chunks, begin = blockIdx.x % b.chunks * kSortItems;
  const int64_t base = int64_t{segment} * b.items;
  int32_t* const own = counts + thread / 32 * (kDigits + 1);
  for (int i = thread; i < kSortWarps * (kDigits + 1); i += kThreads) counts[i] = 0;
  __syncthreads();

  int32_t key[kSortRounds], rank[kSortRounds];
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    const int32_t i = begin + (thread / 32 * kSortRounds + round) * 32 + lane;
    key[round] = i < b.items ? b.keys[base + i] : -1;
    const int digit = key[round] < 0 ? kDigits : digit_of(key[round], shift);
    const unsigned equal = __match_any_sync(kAllLanes, digit), lower = equal & ((1u << lane) - 1);
    const int32_t count = own[digit];
    __syncwarp();
    rank[round] = count + __popc(lower);
    if (lower == 0) own[digit] = count + __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  int32_t place = b.before[int64_t{blockIdx.x} * kDigits + thread] + b.smaller[int64_t{segment} * kDigits + thread];
  for (int warp = 0; warp < kSortWarps; ++warp) {
    int32_t& count = counts[warp * (kDigits + 1) + thread];
    const int32_t next = place + count;
    count = place;
    place = next;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    if (key[round] < 0) continue;
    const int32_t i = begin + (thread / 32 * kSortRounds + round) * 32 + lane;
    const int64_t target = base + own[digit_of(key[round], shift)] + rank[round];
    b.next_keys[target] = key[round];
    b.next_indices[target] = b.indices[base + i];
  }
}

// A thread per segment and key.
__global__ void __launch_bounds__(kThreads) begins_kernel(SortBuffers b, int32_t keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, segment = i / (keys + 1);
  if (segment >= b.segments) return;
  const int32_t key = static_cast<int32_t>(i % (keys + 1));
  const int32_t* sorted = b.keys + segment * b.items;
  int32_t low = 0, high = b.items;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (sorted[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  b.begins[i] = low;
}

// A warp per pixel: its lanes plan 32 samples at a time, then groups of `lanes` lanes with N channels each sum them up.
template <class T, class C, int N>
__global__ void __launch_bounds__(kThreads, 2)
    gather_kernel(const Problem p, const Gradients g, const typename AccumulatorOf<T>::type* attention, SortBuffers b,
                  int lanes) {
  using A = typename AccumulatorOf<T>::type;
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, ways = 32 / lanes, way = lane / lanes;
  const int32_t keys = static_cast<int32_t>(p.keys), heads = static_cast<int32_t>(p.heads);
  const int32_t tiles = (keys + kWarps - 1) / kWarps, segment = blockIdx.x / tiles;
  // The last levels are the smallest, and their pixels have the most samples: they start first.
  const int32_t key = keys - 1 - (blockIdx.x % tiles * kWarps + threadIdx.x / 32);
  if (key < 0) return;
  const int32_t image = segment / heads, head = segment % heads;
  const int32_t samples = static_cast<int32_t>(p.samples());
  const int32_t* begins = b.begins + int64_t{segment} * (keys + 1);
  const int32_t* indices = b.indices + int64_t{segment} * b.items;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));
  const T* grad_output = static_cast<const T*>(g.output) + (image * p.queries * heads + head) * p.channels;
  T* grad_value = static_cast<T*>(g.value) + ((image * p.keys + key) * heads + head) * p.channels;

  for (int64_t c0 = 0; c0 < p.channels; c0 += lanes * N) {
    const int64_t c = c0 + lane % lanes * N;
    A sum[N] = {};
    for (int32_t level = 0; level < p.levels; ++level) {
      const Level shape = level_of(p, level);
      const int32_t pixel = key - shape.start;
      if (pixel < 0 || pixel >= shape.height * shape.width) continue;
      const int32_t row = pixel / shape.width, column = pixel % shape.width;
      // The samples of this pixel and the one before it are consecutive, as are those of the row above.
      const int32_t left = key - (column > 0 ? 1 : 0);
      const int32_t begin = begins[left], count = begins[key + 1] - begin;
      const int32_t above = row > 0 ? begins[left - shape.width] : 0;
      const int32_t total = count + (row > 0 ? begins[key + 1 - shape.width] - above : 0);
      for (int32_t first = 0; first < total; first += 32) {
        const int32_t i = first + lane;
        int32_t query = -1;
        A weight = 0;
        if (i < total) {
          const int32_t item = indices[i < count ? begin + i : above + i - count], s = item % samples;
          const int64_t q = image * p.queries + item / samples, index = (q * heads + head) * samples + s;
          const Cell<A, int32_t> cell = cell_of<A, C>(p, q, index, level, shape);
          const int32_t down = row - cell.row, right = column - cell.column;
          // Cells that begin outside the level have the key of a pixel inside, and levels may overlap in `value`.
          if (down <= 1 && right <= 1 && p.level_of(s) == level) {
            query = item / samples;
            weight = corner_weight(cell.down, cell.right, 2 * down + right) *
                     (attention != nullptr ? attention[index] : widen<A>(static_cast<const C*>(p.weights)[index]));
          }
        }
#pragma unroll 4
        for (int32_t turn = 0; turn < (total - first < 32 ? total - first : 32); turn += ways) {
          const int32_t other = __shfl_sync(kAllLanes, query, turn + way);
          const A scale = __shfl_sync(kAllLanes, weight, turn + way);
          A grad[N] = {};
          if (other >= 0 && c < p.channels) load(row_at(grad_output + c, other, row_bytes), grad);
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += scale * grad[j];
        }
      }
    }
    for (int distance = lanes; distance < 32; distance *= 2) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], distance);
    }
    if (way == 0 && c < p.channels) store(grad_value + c, sum);
  }
}

cudaError_t sort(SortBuffers& b, int64_t keys, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(b.segments * b.chunks)), block(kThreads);
  for (int shift = 0; keys >> shift != 0; shift += kDigitBits) {
    MSDA_LAUNCH(count_kernel, grid, block, kDigits * sizeof(int32_t), stream, b, shift);
    MSDA_LAUNCH(prefix_kernel, dim3(static_cast<unsigned>(b.segments)), dim3(kDigits), kDigits * sizeof(int32_t),
                stream, b);
    MSDA_LAUNCH(scatter_kernel, grid, block, kSortWarps * (kDigits + 1) * sizeof(int32_t), stream, b, shift);
    std::swap(b.keys, b.next_keys);
    std::swap(b.indices, b.next_indices);
  }
  const int64_t begins = b.segments * (keys + 1);
  MSDA_LAUNCH(begins_kernel, dim3(static_cast<unsigned>((begins + kThreads - 1) / kThreads)), block, 0, stream, b,
              static_cast<int32_t>(keys));
  return cudaGetLastError();
}

template <class T, class C, int N>
cudaError_t ordered_value_gradient(const Problem& p, const Gradients& g, const Scratch& scratch, int lanes,
                                   cudaStream_t stream) {
  using A = typename AccumulatorOf<T>::type;
  if (p.batch * p.keys == 0) return cudaSuccess;
  if (p.queries == 0) return cudaMemsetAsync(g.value, 0, p.batch * p.keys * p.heads * p.channels * sizeof(T), stream);
  SortBuffers buffers(p, scratch.sort);
  MSDA_LAUNCH((keys_kernel<A, C>), dim3(static_cast<unsigned>(buffers.segments * buffers.chunks)), dim3(kThreads), 0,
              stream, p, buffers);
  const cudaError_t error = sort(buffers, p.keys, stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.keys + kSortWarps - 1) / kSortWarps;
  MSDA_LAUNCH((gather_kernel<T, C, N>), dim3(static_cast<unsigned>(buffers.segments * tiles)), dim3(kThreads), 0,
              stream, p, g, static_cast<const A*>(scratch.attention), buffers, lanes);
  return cudaGetLastError();
}

}  // namespace
}  // namespace msda::cuda
