// The gradient of the value, summed in a fixed order. The backward kernel writes what it needs of each sample, and the
// first pixel of the sample's cell as a key. The samples of each image and head are sorted by key with a stable radix
// sort. The gradients of a strip of pixels are then sums over the samples of two rows of cells, gathered by one warp:
// there are no atomics, and every element of a level is written once.
#pragma once

#include <algorithm>
#include <utility>

#include "common.cuh"

namespace msda::cuda {
namespace {

constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kSortWarps = kThreads / 32, kSortRounds = 8, kSortItems = kThreads * kSortRounds;

// Items of all segments (a segment is an image and head), in the order (segment, item); see Scratch::sort. The caller
// writes the keys; the indices of the sorted items are those of the caller's order.
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
    b.next_indices[target] = shift == 0 ? i : b.indices[base + i];
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

// Neighboring pixels of a row of a level, or none.
struct Strip {
  int32_t row, column, key;  // of the first pixel
  int32_t pixels;
  int32_t width;  // of the level
};

// How many samples a strip may have on average. Strips of more than one pixel are shortened until they have fewer.
constexpr int kStripSamples = 2048;

// Strip number `index`, level by level.
template <int kLongestBits>
__device__ __forceinline__ Strip strip_at(const Problem& p, int64_t index) {
  for (int level = 0; level < p.levels; ++level) {
    const Level shape = level_of(p, level);
    if (shape.height == 0) continue;
    const int64_t area = int64_t{shape.height} * shape.width, samples = p.queries * p.points_on(level);
    int bits = kLongestBits;
    while (bits > 0 && 2 * ((1 << bits) + 1) * samples > kStripSamples * area) --bits;
    const uint32_t strips = (shape.width + (1 << bits) - 1) >> bits;  // of a row
    if (index < int64_t{shape.height} * strips) {
      const auto row = static_cast<int32_t>(static_cast<uint32_t>(index) / strips);
      const auto column = static_cast<int32_t>(static_cast<uint32_t>(index) - row * strips) << bits;
      const int32_t rest = shape.width - column;
      return {row, column, shape.start + row * shape.width + column, rest < 1 << bits ? rest : 1 << bits, shape.width};
    }
    index -= int64_t{shape.height} * strips;
  }
  return {};
}

// A sample adds the gradient of the output to two pixels of a strip. Pixel 0 is the one before the strip, whose first
// pixel is 1.
template <class A>
struct alignas(sizeof(A) == 4 ? 16 : 8) StripSample {
  A left, right;
  int32_t query, pixel;  // the left one
};

// The samples of a strip: those of the cells that begin in the row above, then those of the cells that begin in its own
// row. Both are consecutive, and sorted by pixel.
class StripSamples {
 public:
  int32_t count;

  __device__ __forceinline__ StripSamples(const SortBuffers& b, const Strip& strip, int64_t segment, int64_t keys)
      : strip(strip), base(segment * b.items), sorted_keys(b.keys + base), indices(b.indices + base) {
    const int32_t* const begins = b.begins + segment * (keys + 1) + strip.key;
    const int32_t before = strip.column > 0 ? 1 : 0;
    own = begins[-before];
    above = strip.row > 0 ? begins[-strip.width - before] : 0;
    above_count = strip.row > 0 ? begins[strip.pixels - strip.width] - above : 0;
    count = above_count + begins[strip.pixels] - own;
  }

  // Sample number i. What does not exist is added to pixels after the strip.
  template <class A>
  __device__ __forceinline__ StripSample<A> at(int32_t i, const ValueSample<A>* samples) const {
    StripSample<A> result = {0, 0, 0, strip.pixels + 1};
    if (i >= count) return result;
    const bool from_above = i < above_count;
    const int32_t position = i + (from_above ? above : own - above_count);
    const ValueSample<A> sample = samples[base + indices[position]];
    const bool only_lower = (sample.query & kOnlyLower) != 0, only_right = (sample.query & kOnlyRight) != 0;
    // A cell that begins before the first row or column has the key of a pixel in it.
    const int32_t pixel = sorted_keys[position] - strip.key + (from_above ? strip.width : 0) + (only_right ? 0 : 1);
    if (pixel < 0 || (from_above && only_lower)) return result;
    const A scale = sample.weight * (from_above || only_lower ? sample.down : 1 - sample.down);
    return {scale * (1 - sample.right), scale * sample.right, static_cast<int32_t>(sample.query & kQuery), pixel};
  }

 private:
  Strip strip;
  int64_t base;  // of the segment's samples
  const int32_t *sorted_keys, *indices;
  int32_t above, above_count, own;
};

constexpr int kGatherThreads = 128, kGatherWarps = kGatherThreads / 32;
constexpr int kTogetherBits = 2, kTogether = 1 << kTogetherBits;  // samples whose loads overlap

// The groups of a warp that gathers, with 1 << bits lanes each. The memory of a group has planned samples and the sums
// of a strip's pixels, with one pixel before and two after them.
template <class A, int N>
struct GatherGroups {
  static constexpr int kLongestBits = N * sizeof(A) > 16 ? 2 : 3, kPixels = (1 << kLongestBits) + 3;  // of strips

  int bits;

  MSDA_MEMBER int lanes() const { return 1 << bits; }
  MSDA_MEMBER int count() const { return 32 >> bits; }
  MSDA_MEMBER int chunk_bits() const { return bits < kTogetherBits ? kTogetherBits : bits; }  // of planned samples
  MSDA_MEMBER int sum_bytes() const { return kPixels * static_cast<int>(sizeof(Pack<A, N>)) << bits; }
  MSDA_MEMBER int planned_bytes() const { return static_cast<int>(sizeof(StripSample<A>)) << chunk_bits(); }
};

// The sums of a group for the pixels of a strip, in shared memory; those of two neighboring pixels are in registers. A
// lane has N channels.
template <class A, int N>
class StripSums {
 public:
  // `memory` is this lane's of pixel 0; `stride` leads from a pixel to the next one.
  __device__ __forceinline__ StripSums(A* memory, int stride, int pixels)
      : memory(memory), stride(stride), last(pixels + 2) {
    const A zeros[N] = {};
#pragma unroll
    for (int i = 0; i < GatherGroups<A, N>::kPixels; ++i) store(memory + i * stride, zeros);
  }

  __device__ __forceinline__ void add(const StripSample<A>& sample, const A (&grad)[N]) {
    while (pixel != sample.pixel) {  // to the next pixel, or from the last one to the first
      add_to(pixel, left);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        left[j] = right[j];
        right[j] = 0;
      }
      pixel = pixel == last ? 0 : pixel + 1;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      left[j] += sample.left * grad[j];
      right[j] += sample.right * grad[j];
    }
  }

  __device__ __forceinline__ void finish() {
    add_to(pixel, left);
    add_to(pixel + 1, right);
  }

 private:
  __device__ __forceinline__ void add_to(int target, const A (&x)[N]) {
    A sum[N];
    load(memory + target * stride, sum);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += x[j];
    store(memory + target * stride, sum);
  }

  A* memory;
  int stride, last, pixel = 0;
  A left[N] = {}, right[N] = {};
};

// On a multiprocessor, without spills.
template <class T, int N>
constexpr int kGatherBlocks = N > 1 && sizeof(T) != sizeof(float) ? 5 : 6;

// A warp per strip, from the last strip to the first, because the last levels have the most samples per strip. The
// groups of a warp take an equal share of the samples.
template <class T, int N>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks<T, N>)
    gather_kernel(const Problem p, const Gradients g,
                  const ValueSample<typename AccumulatorOf<T>::type>* __restrict__ samples, SortBuffers b,
                  GatherGroups<typename AccumulatorOf<T>::type, N> groups) {
  using A = typename AccumulatorOf<T>::type;
  using Groups = GatherGroups<A, N>;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 >> groups.bits, lane = threadIdx.x & (groups.lanes() - 1);
  const int chunk = 1 << groups.chunk_bits();
  const uint32_t segment = blockIdx.x, heads = static_cast<uint32_t>(p.heads);
  const uint32_t image = segment / heads, head = segment - image * heads;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));
  const T* const grad_output = static_cast<const T*>(g.output) + (image * p.queries * heads + head) * p.channels;

  unsigned char* const all_sums = shared_memory + warp * groups.count() * groups.sum_bytes();
  unsigned char* const all_planned = shared_memory + kGatherWarps * groups.count() * groups.sum_bytes();
  A* const own_sums = reinterpret_cast<A*>(all_sums + group * groups.sum_bytes()) + lane * N;
  auto* const planned =
      reinterpret_cast<StripSample<A>*>(all_planned + (warp * groups.count() + group) * groups.planned_bytes());

  int64_t index = (gridDim.y - 1 - blockIdx.y) * kGatherWarps + warp;
  for (;; index += int64_t{gridDim.y} * kGatherWarps) {
    const Strip strip = strip_at<Groups::kLongestBits>(p, index);
    if (strip.pixels == 0) return;
    const StripSamples strip_samples(b, strip, segment, p.keys);
    const int chunk_bits_of_warp = groups.chunk_bits() + 5 - groups.bits;
    const int32_t chunks = (strip_samples.count + (1 << chunk_bits_of_warp) - 1) >> chunk_bits_of_warp;  // of a group
    for (int64_t c0 = 0; c0 < p.channels; c0 += groups.lanes() * N) {
      const int64_t c = c0 + lane * N;
      const T* const source = grad_output + (c < p.channels ? c : 0);
      StripSums<A, N> sums(own_sums, groups.lanes() * N, strip.pixels);
      int32_t first = group * chunks << groups.chunk_bits();
      for (int32_t i = 0; i < chunks; ++i, first += chunk) {
        for (int k = lane; k < chunk; k += groups.lanes()) planned[k] = strip_samples.at(first + k, samples);
        __syncwarp();
        for (int j = 0; j < chunk; j += kTogether) {
          StripSample<A> sample[kTogether];
          Pack<T, N> loaded[kTogether];
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            sample[k] = planned[j + k];
            loaded[k] = *reinterpret_cast<const Pack<T, N>*>(row_at(source, sample[k].query, row_bytes));
          }
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            A grad[N];
            load(loaded[k].x, grad);
            sums.add(sample[k], grad);
          }
        }
        __syncwarp();
      }
      sums.finish();
      __syncwarp();
      for (int i = group; i < strip.pixels; i += groups.count()) {
        A sum[N] = {}, part[N];
#pragma unroll 4
        for (int other = 0; other < groups.count(); ++other) {
          const A* const others = reinterpret_cast<const A*>(all_sums + other * groups.sum_bytes()) + lane * N;
          load(others + ((i + 1) << groups.bits) * N, part);
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += part[j];
        }
        T* const row = static_cast<T*>(g.value) + ((image * p.keys + strip.key + i) * heads + head) * p.channels;
        if (c < p.channels) store(row + c, sum);
      }
      __syncwarp();
    }
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

// Sums what the backward kernel has written: the samples, and their keys at the beginning of `memory`.
template <class T, int N>
cudaError_t ordered_value_gradient(const Problem& p, const Gradients& g,
                                   const ValueSample<typename AccumulatorOf<T>::type>* samples, int32_t* memory,
                                   cudaStream_t stream) {
  if (p.batch * p.keys * p.queries == 0) return cudaSuccess;
  SortBuffers buffers(p, memory);
  const cudaError_t error = sort(buffers, p.keys, stream);
  if (error != cudaSuccess) return error;
  GatherGroups<typename AccumulatorOf<T>::type, N> groups{0};
  while (groups.bits < 5 && groups.lanes() * N < p.channels) ++groups.bits;
  // About as many warps as there are strips. The host does not know the levels.
  const int64_t strips = (p.keys >> groups.kLongestBits) + 2 * int64_t{buffers.items} / kStripSamples;
  const dim3 grid(static_cast<unsigned>(buffers.segments),
                  static_cast<unsigned>(std::min(strips / kGatherWarps + 1, kGridLimit)));
  const int bytes = kGatherWarps * groups.count() * (groups.sum_bytes() + groups.planned_bytes());
  MSDA_LAUNCH((gather_kernel<T, N>), grid, dim3(kGatherThreads), static_cast<size_t>(bytes), stream, p, g, samples,
              buffers, groups);
  return cudaGetLastError();
}

}  // namespace
}  // namespace msda::cuda
