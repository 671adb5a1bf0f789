// CUDA kernels of multi-scale deformable attention.
//
// A unit is one query of one head; a group of 2^k <= 32 lanes of a warp serves a unit, and a block serves units of one
// image and head, so that neighbouring queries share the L1 cache. The lanes of a group first plan samples in parallel
// (corner keys, fractions, attention weights, in shared memory), then run through them together, each lane with 16 bytes
// of channels. Groups never wait for one another: warp-level synchronisation is all there is.
#include "ms_deform_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#ifndef MSDA_EMULATED
#define MSDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace msda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 32;  // samples of a unit that are planned at a time
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

template <class A>
struct Sample {
  int32_t key[4];  // of the corners; -1 where there is none
  A down, right, weight;
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

template <class A, class T, int N>
__device__ __forceinline__ void load(const T* source, A (&target)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = widen<A>(pack.x[i]);
}

template <class T, class A, int N>
__device__ __forceinline__ void store(T* target, const A (&source)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.x[i] = narrow<T>(source[i]);
  *reinterpret_cast<Pack<T, N>*>(target) = pack;
}

template <int N, class A>
__device__ __forceinline__ void atomic_add(A* target, const A (&x)[N]) {
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

// Over the `lanes` of a group.
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

// What a lane knows about its unit. `index` counts (image, query, head), as the tensors do.
struct Unit {
  int64_t image, query, head, index;
  bool valid;
};

__device__ __forceinline__ Unit unit_of(const Problem& p, int64_t block, int64_t units_per_block) {
  const int64_t tiles = (p.queries + units_per_block - 1) / units_per_block;
  Unit unit;
  unit.image = block / (tiles * p.heads);
  unit.head = block / tiles % p.heads;
  unit.query = block % tiles * units_per_block + threadIdx.y;
  unit.valid = unit.query < p.queries;
  unit.index = (unit.image * p.queries + unit.query) * p.heads + unit.head;
  return unit;
}

struct Level {
  int32_t height, width, start;
};

__device__ __forceinline__ Level level_of(const Problem& p, int64_t level) {
  return {static_cast<int32_t>(p.spatial_shapes[2 * level]), static_cast<int32_t>(p.spatial_shapes[2 * level + 1]),
          static_cast<int32_t>(p.level_start_index[level])};
}

// The reference point of a query on a level: (x, y, w, h), as far as there is one.
template <class A, class C>
__device__ __forceinline__ void load_reference(const Problem& p, int64_t row, int64_t level, A (&reference)[4]) {
  const C* source = static_cast<const C*>(p.reference_points) + (row * p.levels + level) * p.reference_size;
  for (int i = 0; i < 4; ++i) reference[i] = i < p.reference_size ? widen<A>(source[i]) : A(0);
}

// The cell of one sample: `row` counts (image, query), `coordinate` the pairs of coordinates.
template <class A, class C>
__device__ __forceinline__ Cell<A, int32_t> cell_of(const Problem& p, int64_t row, int64_t coordinate, int64_t level,
                                           const Level& shape) {
  const C* source = static_cast<const C*>(p.coordinates) + 2 * coordinate;
  const A x = widen<A>(source[0]), y = widen<A>(source[1]), width = shape.width, height = shape.height;
  if (p.reference_size == 0)
    return locate(pixel_of_location(x, width), pixel_of_location(y, height), shape.height, shape.width);
  A reference[4];
  load_reference<A, C>(p, row, level, reference);
  if (p.reference_size == 2)
    return locate(pixel_of_point(reference[0], x, width), pixel_of_point(reference[1], y, height), shape.height,
                  shape.width);
  const A unit = A(0.5) / static_cast<A>(p.points);
  return locate(pixel_of_box(reference[0], reference[2], x, unit, width),
                pixel_of_box(reference[1], reference[3], y, unit, height), shape.height, shape.width);
}

template <class A>
__device__ __forceinline__ Sample<A> sample_of(const Cell<A, int32_t>& cell, const Level& shape, A weight) {
  Sample<A> sample;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sample.key[i] = corner_exists(cell, i, shape.height, shape.width) ? corner_key(cell, i, shape.start, shape.width) : -1;
  sample.down = cell.down;
  sample.right = cell.right;
  sample.weight = weight;
  return sample;
}

// The softmax of a unit's logits, or its weights as they are.
template <class A, class C>
struct Attention {
  const C* source;
  A largest = 0, scale = 1;
  bool softmax;

  __device__ Attention(const Problem& p, const Unit& unit, int lanes)
      : source(static_cast<const C*>(p.weights) + unit.index * p.samples()), softmax(p.reference_size != 0) {
    if (!softmax) return;
    const int64_t count = unit.valid ? p.samples() : 0;
    largest = -INFINITY;
    for (int64_t s = threadIdx.x; s < count; s += lanes) {
      const A logit = widen<A>(source[s]);
      largest = logit > largest ? logit : largest;
    }
    largest = group_max(largest, lanes);
    A sum = 0;
    for (int64_t s = threadIdx.x; s < count; s += lanes) sum += exponential(widen<A>(source[s]) - largest);
    scale = A(1) / group_sum(sum, lanes);
  }

  __device__ __forceinline__ A operator()(int64_t s) const {
    const A x = widen<A>(source[s]);
    return softmax ? exponential(x - largest) * scale : x;
  }
};

// Plans samples [first, first + count) of the group's unit.
template <class A, class C>
__device__ __forceinline__ void plan(const Problem& p, const Unit& unit, const Attention<A, C>& attention, int64_t first,
                                     int count, Sample<A>* samples) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (!unit.valid) {
      samples[i] = {{-1, -1, -1, -1}, 0, 0, 0};
      continue;
    }
    const int64_t s = first + i, level = s / p.points;
    const Level shape = level_of(p, level);
    const Cell<A, int32_t> cell =
        cell_of<A, C>(p, unit.image * p.queries + unit.query, unit.index * p.samples() + s, level, shape);
    samples[i] = sample_of(cell, shape, attention(s));
  }
}

__device__ __forceinline__ int chunk_size(int64_t samples, int64_t first) {
  return static_cast<int>(samples - first < kChunk ? samples - first : kChunk);
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T, class C, int N>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Problem p, T* __restrict__ output) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = blockDim.x;
  const Unit unit = unit_of(p, blockIdx.x, blockDim.y);
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory) + threadIdx.y * kChunk;
  const Attention<A, C> attention(p, unit, lanes);
  const T* rows = static_cast<const T*>(p.value) + (unit.image * p.keys * p.heads + unit.head) * p.channels;
  const int64_t step = p.heads * p.channels;

  for (int64_t c0 = 0; c0 < p.channels; c0 += lanes * N) {
    const int64_t c = c0 + threadIdx.x * N;
    const bool active = c < p.channels;
    A sum[N] = {};
    for (int64_t first = 0; first < p.samples(); first += kChunk) {
      const int count = chunk_size(p.samples(), first);
      __syncwarp();
      plan(p, unit, attention, first, count, samples);
      __syncwarp();
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const Sample<A> sample = samples[i];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (sample.key[corner] < 0 || !active) continue;
          const A weight = corner_weight(sample.down, sample.right, corner) * sample.weight;
          A x[N];
          load(rows + sample.key[corner] * step + c, x);
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += weight * x[j];
        }
      }
    }
    if (active && unit.valid) store(output + unit.index * p.channels + c, sum);
  }
}

// The gradients of coordinates and weights, and with kAtomic that of the value, summed into `grad_value`.
template <class T, class C, int N, bool kAtomic>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Problem p, const Gradients g, typename AccumulatorOf<T>::type* __restrict__ grad_value,
                    typename AccumulatorOf<T>::type* __restrict__ parts,
                    typename AccumulatorOf<T>::type* __restrict__ attention_out) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = blockDim.x;
  const Unit unit = unit_of(p, blockIdx.x, blockDim.y);
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory) + threadIdx.y * kChunk;
  // Per sample, after the planned samples of all units: first the four dots, then the two gradients of the position.
  A* dots = reinterpret_cast<A*>(shared_memory + blockDim.y * kChunk * sizeof(Sample<A>)) + threadIdx.y * kChunk * 4;
  const Attention<A, C> attention(p, unit, lanes);
  const int64_t base = (unit.image * p.keys * p.heads + unit.head) * p.channels, step = p.heads * p.channels;
  const T* rows = static_cast<const T*>(p.value) + base;
  const T* grad_output = static_cast<const T*>(g.output) + unit.index * p.channels;
  const A box_unit = A(0.5) / static_cast<A>(p.points);

  // The gradient of a logit needs the mean of the weights' gradients over all samples of the unit. If they are not all
  // planned at once, a pass before finds it.
  A mean = 0;
  const bool several = p.samples() > kChunk;
  for (int pass = p.reference_size != 0 && several ? 0 : 1; pass < 2; ++pass) {
    for (int64_t first = 0; first < p.samples(); first += kChunk) {
      const int count = chunk_size(p.samples(), first);
      __syncwarp();
      plan(p, unit, attention, first, count, samples);
      __syncwarp();

      for (int i = 0; i < count; ++i) {
        const Sample<A> sample = samples[i];
        A dot[4] = {};
        for (int64_t c = threadIdx.x * N; c < p.channels && unit.valid; c += lanes * N) {
          A grad[N];
          load(grad_output + c, grad);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (sample.key[corner] < 0) continue;
            A x[N];
            load(rows + sample.key[corner] * step + c, x);
#pragma unroll
            for (int j = 0; j < N; ++j) dot[corner] += grad[j] * x[j];
            if (kAtomic && pass == 1) {
              const A weight = corner_weight(sample.down, sample.right, corner) * sample.weight;
#pragma unroll
              for (int j = 0; j < N; ++j) x[j] = weight * grad[j];
              atomic_add<N>(grad_value + base + sample.key[corner] * step + c, x);
            }
          }
        }
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) dot[corner] = group_sum(dot[corner], lanes);
        if (threadIdx.x == 0) {
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) dots[4 * i + corner] = dot[corner];
        }
      }
      __syncwarp();

      if (p.reference_size != 0 && (pass == 0 || !several)) {
        A part = 0;
        for (int i = threadIdx.x; i < count; i += lanes) {
          const Sample<A> sample = samples[i];
          const A* d = dots + 4 * i;
          part += sample.weight * sample_gradient(sample.down, sample.right, d[0], d[1], d[2], d[3]).weight;
        }
        mean += group_sum(part, lanes);
      }
      if (pass == 0) continue;

      for (int i = threadIdx.x; i < count && unit.valid; i += lanes) {
        const Sample<A> sample = samples[i];
        A* d = dots + 4 * i;
        const SampleGradient<A> grad = sample_gradient(sample.down, sample.right, d[0], d[1], d[2], d[3]);
        const bool inside = (sample.key[0] & sample.key[1] & sample.key[2] & sample.key[3]) >= 0;
        const int64_t s = first + i, level = s / p.points, index = unit.index * p.samples() + s;
        const Level shape = level_of(p, level);
        const A pixel_x = inside ? grad.x * sample.weight : A(0), pixel_y = inside ? grad.y * sample.weight : A(0);
        const A location_x = pixel_x * static_cast<A>(shape.width), location_y = pixel_y * static_cast<A>(shape.height);
        A x = location_x, y = location_y, weight = grad.weight;
        if (p.reference_size != 0) {
          weight = sample.weight * (grad.weight - mean);
          d[0] = location_x;
          d[1] = location_y;
          d[2] = d[3] = 0;
          if (p.reference_size == 2) {
            x = pixel_x;
            y = pixel_y;
          } else if (inside) {
            const C* offset = static_cast<const C*>(p.coordinates) + 2 * index;
            A box[4];
            load_reference<A, C>(p, unit.image * p.queries + unit.query, level, box);
            x = location_x * box[2] * box_unit;
            y = location_y * box[3] * box_unit;
            d[2] = location_x * widen<A>(offset[0]) * box_unit;
            d[3] = location_y * widen<A>(offset[1]) * box_unit;
          }
          if (attention_out != nullptr) attention_out[index] = sample.weight;
        }
        static_cast<C*>(g.weights)[index] = narrow<C>(weight);
        static_cast<C*>(g.coordinates)[2 * index] = narrow<C>(x);
        static_cast<C*>(g.coordinates)[2 * index + 1] = narrow<C>(y);
      }
      if (p.reference_size == 0) continue;
      __syncwarp();

      // This head's part of the gradient of the reference points; a level may begin in an earlier chunk.
      const int64_t last_level = (first + count - 1) / p.points;
      for (int64_t level = first / p.points + threadIdx.x; level <= last_level && unit.valid; level += lanes) {
        const int64_t begin = level * p.points > first ? level * p.points : first;
        const int64_t end = (level + 1) * p.points < first + count ? (level + 1) * p.points : first + count;
        A* part = parts + (((unit.image * p.heads + unit.head) * p.queries + unit.query) * p.levels + level) *
                              p.reference_size;
        for (int f = 0; f < p.reference_size; ++f) {
          A sum = begin == level * p.points ? A(0) : part[f];
          for (int64_t s = begin; s < end; ++s) sum += dots[4 * (s - first) + f];
          part[f] = sum;
        }
      }
    }
  }
}

template <class A, class C>
__global__ void __launch_bounds__(kThreads, 2) sum_over_heads_kernel(const Problem p, const A* parts, C* grad_reference) {
  const int64_t features = p.levels * p.reference_size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.batch * p.queries * features) return;
  const int64_t image = i / (p.queries * features), rest = i % (p.queries * features);
  A sum = 0;
  for (int64_t head = 0; head < p.heads; ++head) sum += parts[(image * p.heads + head) * p.queries * features + rest];
  grad_reference[i] = narrow<C>(sum);
}

// The gradient of the value in a fixed order. A block owns some keys of one image and head and some channels. It scans
// the samples of the levels that these keys belong to; the threads list, in order, the samples that touch the keys, and
// each warp adds the corners whose key is its own (modulo the number of warps), one after another, lanes over channels.
constexpr int kOrderedThreads = 128, kOrderedWarps = kOrderedThreads / 32, kOrderedKeys = 128;

template <class A>
constexpr int kOrderedChannels = 256 / static_cast<int>(sizeof(A));

template <class A>
struct OrderedMemory {
  A rows[kOrderedKeys][kOrderedChannels<A>];
  Sample<A> samples[kOrderedThreads];
  int64_t unit[kOrderedThreads];  // of each listed sample
  int counts[kOrderedWarps];
};

template <class T, class C>
__global__ void __launch_bounds__(kOrderedThreads, 4)
    ordered_value_kernel(const Problem p, const Gradients g, const typename AccumulatorOf<T>::type* attention) {
  using A = typename AccumulatorOf<T>::type;
  constexpr int kChannels = kOrderedChannels<A>;
  OrderedMemory<A>& memory = *reinterpret_cast<OrderedMemory<A>*>(shared_memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t slices = (p.channels + kChannels - 1) / kChannels, tiles = (p.keys + kOrderedKeys - 1) / kOrderedKeys;
  int64_t block = blockIdx.x;
  const int64_t c0 = block % slices * kChannels;
  block /= slices;
  const int32_t key0 = static_cast<int32_t>(block % tiles) * kOrderedKeys;
  block /= tiles;
  const int64_t head = block % p.heads, image = block / p.heads;
  const int keys = static_cast<int>(p.keys - key0 < kOrderedKeys ? p.keys - key0 : kOrderedKeys);
  const int channels = static_cast<int>(p.channels - c0 < kChannels ? p.channels - c0 : kChannels);

  for (int i = thread; i < kOrderedKeys * kChannels; i += kOrderedThreads) memory.rows[i / kChannels][i % kChannels] = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const Level shape = level_of(p, level);
    if (shape.start >= key0 + keys || shape.start + shape.height * shape.width <= key0) continue;
    const int64_t count = p.queries * p.points;
    for (int64_t first = 0; first < count; first += kOrderedThreads) {
      const int64_t i = first + thread, query = i / p.points;
      const int64_t row = image * p.queries + query, unit = row * p.heads + head;
      bool touches = false;
      Sample<A> sample;
      if (i < count) {
        const int64_t index = unit * p.samples() + level * p.points + i % p.points;
        const A weight = attention != nullptr ? attention[index] : widen<A>(static_cast<const C*>(p.weights)[index]);
        sample = sample_of(cell_of<A, C>(p, row, index, level, shape), shape, weight);
        for (int corner = 0; corner < 4; ++corner) {
          const bool own = sample.key[corner] >= key0 && sample.key[corner] < key0 + keys;
          sample.key[corner] = own ? sample.key[corner] - key0 : -1;
          touches |= own;
        }
      }
      const unsigned vote = __ballot_sync(kAllLanes, touches);
      __syncthreads();  // the list is still in use
      if (lane == 0) memory.counts[warp] = __popc(vote);
      __syncthreads();
      int position = __popc(vote & ((1u << lane) - 1)), listed = 0;
      for (int w = 0; w < kOrderedWarps; ++w) {
        position += w < warp ? memory.counts[w] : 0;
        listed += memory.counts[w];
      }
      if (touches) {
        memory.samples[position] = sample;
        memory.unit[position] = unit;
      }
      __syncthreads();
      for (int s = 0; s < listed; ++s) {
        const Sample<A> other = memory.samples[s];
        const T* grad = static_cast<const T*>(g.output) + memory.unit[s] * p.channels + c0;
        for (int corner = 0; corner < 4; ++corner) {
          if (other.key[corner] < 0 || other.key[corner] % kOrderedWarps != warp) continue;
          const A weight = corner_weight(other.down, other.right, corner) * other.weight;
          for (int c = lane; c < channels; c += 32) memory.rows[other.key[corner]][c] += weight * widen<A>(grad[c]);
        }
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < keys * channels; i += kOrderedThreads) {
    const int key = i / channels, c = i % channels;
    static_cast<T*>(g.value)[((image * p.keys + key0 + key) * p.heads + head) * p.channels + c0 + c] =
        narrow<T>(memory.rows[key][c]);
  }
}

struct Shape {
  dim3 grid, block;
};

// Groups wide enough for `vectors` lanes, and a block per units_per_block queries of an image and head.
Shape shape_for(const Problem& p, int64_t vectors) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  const unsigned units = kThreads / lanes < 64 ? kThreads / lanes : 64;  // bounds the shared memory
  const int64_t tiles = (p.queries + units - 1) / units;
  return {dim3(static_cast<unsigned>(p.batch * p.heads * tiles)), dim3(lanes, units)};
}

template <class T, class C, int N>
cudaError_t forward_as(const Problem& p, void* output, cudaStream_t stream) {
  using A = typename AccumulatorOf<T>::type;
  const Shape shape = shape_for(p, (p.channels + N - 1) / N);
  if (shape.grid.x == 0) return cudaSuccess;
  const size_t shared = shape.block.y * kChunk * sizeof(Sample<A>);
  MSDA_LAUNCH((forward_kernel<T, C, N>), shape.grid, shape.block, shared, stream, p, static_cast<T*>(output));
  return cudaGetLastError();
}

template <class T, class C, int N>
cudaError_t backward_as(const Problem& p, const Gradients& g, const Scratch& scratch, bool deterministic,
                        cudaStream_t stream) {
  using A = typename AccumulatorOf<T>::type;
  A* const grad_value = static_cast<A*>(scratch.value != nullptr ? scratch.value : g.value);
  A* const parts = static_cast<A*>(scratch.reference_points);
  A* const attention = static_cast<A*>(scratch.attention);
  if (!deterministic) {
    const cudaError_t error =
        cudaMemsetAsync(grad_value, 0, p.batch * p.keys * p.heads * p.channels * sizeof(A), stream);
    if (error != cudaSuccess) return error;
  }
  const Shape shape = shape_for(p, (p.channels + N - 1) / N);
  if (shape.grid.x != 0) {
    const size_t shared = shape.block.y * kChunk * (sizeof(Sample<A>) + 4 * sizeof(A));
    const auto kernel = deterministic ? backward_kernel<T, C, N, false> : backward_kernel<T, C, N, true>;
    if (shared > 48 * 1024) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared));
      if (error != cudaSuccess) return error;
    }
    MSDA_LAUNCH(kernel, shape.grid, shape.block, shared, stream, p, g, grad_value, parts, attention);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    if (p.reference_size != 0) {
      const int64_t count = p.batch * p.queries * p.levels * p.reference_size;
      const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
      MSDA_LAUNCH((sum_over_heads_kernel<A, C>), grid, dim3(kThreads), 0, stream, p, parts,
                  static_cast<C*>(g.reference_points));
      error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
  }
  if (deterministic && p.batch * p.keys > 0) {
    const int64_t slices = (p.channels + kOrderedChannels<A> - 1) / kOrderedChannels<A>;
    const int64_t tiles = (p.keys + kOrderedKeys - 1) / kOrderedKeys;
    const dim3 grid(static_cast<unsigned>(p.batch * p.heads * tiles * slices));
    MSDA_LAUNCH((ordered_value_kernel<T, C>), grid, dim3(kOrderedThreads), sizeof(OrderedMemory<A>), stream, p, g,
                attention);
  }
  return cudaGetLastError();
}

// Calls f(T, C, vector width): 16 bytes of channels a lane where the channels and the pointers allow it, else one.
template <class T, class C, class F>
cudaError_t dispatch_width(const Problem& p, uintptr_t pointers, const F& f) {
  constexpr int kWide = 16 / sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(p.value) | pointers) % 16 == 0;
  if (p.channels % kWide == 0 && aligned) return f(T(), C(), std::integral_constant<int, kWide>());
  return f(T(), C(), std::integral_constant<int, 1>());
}

template <class F>
cudaError_t dispatch(const Problem& p, uintptr_t pointers, const F& f) {
  const bool same = p.coordinate_dtype == p.dtype;
  switch (p.dtype) {
    case DType::float64: return dispatch_width<double, double>(p, pointers, f);
    case DType::float32: return dispatch_width<float, float>(p, pointers, f);
    case DType::float16:
      return same ? dispatch_width<__half, __half>(p, pointers, f) : dispatch_width<__half, float>(p, pointers, f);
    case DType::bfloat16:
      return same ? dispatch_width<__nv_bfloat16, __nv_bfloat16>(p, pointers, f)
                  : dispatch_width<__nv_bfloat16, float>(p, pointers, f);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t forward(const Problem& problem, void* output, cudaStream_t stream) {
  return dispatch(problem, reinterpret_cast<uintptr_t>(output), [&](auto t, auto c, auto width) {
    return forward_as<decltype(t), decltype(c), decltype(width)::value>(problem, output, stream);
  });
}

cudaError_t backward(const Problem& problem, const Gradients& gradients, const Scratch& scratch, bool deterministic,
                     cudaStream_t stream) {
  const uintptr_t pointers = reinterpret_cast<uintptr_t>(gradients.output) | reinterpret_cast<uintptr_t>(gradients.value) |
                             reinterpret_cast<uintptr_t>(scratch.value);
  return dispatch(problem, pointers, [&](auto t, auto c, auto width) {
    return backward_as<decltype(t), decltype(c), decltype(width)::value>(problem, gradients, scratch, deterministic, stream);
  });
}

}  // namespace msda::cuda
