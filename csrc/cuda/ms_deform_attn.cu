// CUDA kernels of multi-scale deformable attention.
//
// A unit is one query of one head. A group of 2^k <= 32 lanes of a warp computes a unit, and a block computes units of
// one image and head, so that neighboring queries share the L1 cache. The lanes of a group first plan samples in
// parallel (cells and attention weights, 16 bytes per sample in shared memory), then process each sample together, each
// lane with 16 bytes of channels. All synchronization is within a warp.
#include "common.cuh"
#include "ms_deform_attn.h"
#include "ordered.cuh"

namespace msda::cuda {
namespace {

template <class T>
constexpr int kForwardThreads = sizeof(T) == 2 ? 256 : 512;  // 64 units of 32 channels
template <class T>
constexpr int kForwardBlocks = sizeof(T) == 2 ? 3 : 8 / sizeof(T);  // at least, on a multiprocessor

constexpr int kChunk = 32;               // maximum number of samples of a unit that are planned at a time
constexpr int kBand = 8;                 // rows of pixels, see query_of
constexpr int kSharedBytes = 48 * 1024;  // every device grants these by default
constexpr int kManyBlocks = 1024;        // blocks are made smaller where there are fewer

// A planned sample. Its first corner is the cell's first pixel inside the level. Along each axis, either both neighbors
// exist and the fraction is the weight of the second, or only the first exists and the fraction is minus its weight
// (negative zero for a weight of zero).
template <class A>
struct alignas(16) Sample {
  int32_t key;  // of the first corner; -1 if there is none
  A down, right, weight;
};

template <class A>
__device__ __forceinline__ A within(int32_t first, A fraction, int32_t size) {
  return first < 0 ? -fraction : first + 1 == size ? fraction - A(1) : fraction;
}

template <class A>
__device__ __forceinline__ Sample<A> sample_of(const Cell<A, int32_t>& cell, const Level& shape, A weight) {
  if (!any_exists(cell.row, shape)) return {-1, 0, 0, weight};
  return {first_key(cell, shape), within(cell.row, cell.down, shape.height),
          within(cell.column, cell.right, shape.width), weight};
}

// The corners of a sample (row, column): (first, first), (first, second), (second, first), (second, second).
template <class A>
struct Corners {
  bool exists[4];
  int32_t key[4];
  A weight[4];

  __device__ __forceinline__ Corners(const Sample<A>& sample, int32_t width) {
    const bool below = !std::signbit(sample.down), next = !std::signbit(sample.right);
    const A row[2] = {(below ? A(1) - sample.down : -sample.down) * sample.weight, sample.down * sample.weight};
    const A column[2] = {next ? A(1) - sample.right : -sample.right, sample.right};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exists[i] = sample.key >= 0 && (below || i / 2 == 0) && (next || i % 2 == 0);
      key[i] = sample.key + i / 2 * width + i % 2;
      weight[i] = row[i / 2] * column[i % 2];
    }
  }
};

// The gradients of a sample from d[i] = grad_output . corner i, in the order of Corners.
template <class A>
__device__ __forceinline__ SampleGradient<A> gradient_of(const Cell<A, int32_t>& cell, const A* d) {
  const bool up = cell.row < 0, left = cell.column < 0;  // the first corner is the second one of the cell
  const A d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  const A upper_right = left ? d0 : d1, lower_left = up ? d0 : d2;
  return sample_gradient(cell.down, cell.right, up || left ? A(0) : d0, up ? A(0) : upper_right,
                         left ? A(0) : lower_left, up ? upper_right : (left ? d2 : d3));
}

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
      const int32_t first_row = (position - start) / (kBand * shape.width) * kBand;
      const int32_t rows = shape.height - first_row < kBand ? shape.height - first_row : kBand;
      const int32_t i = position - start - first_row * shape.width;
      return start + (first_row + i % rows) * shape.width + i / rows;
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

__device__ __forceinline__ Unit unit_of(const Problem& p, unsigned tiles) {
  const unsigned heads = static_cast<unsigned>(p.heads), segment = blockIdx.x / tiles;
  const unsigned position = blockIdx.x % tiles * blockDim.y + threadIdx.y;
  Unit unit;
  unit.image = segment / heads;
  unit.head = segment % heads;
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

// The number of samples planned at a time, and a unit's shared memory, padded so that the groups of a warp use
// different banks.
MSDA_INLINE int chunk_of(const Problem& p) { return static_cast<int>(p.samples() < kChunk ? p.samples() : kChunk); }
template <class A>
MSDA_INLINE int samples_per_unit(const Problem& p) {
  return chunk_of(p) + 1;
}
template <class A>
MSDA_INLINE int dots_per_unit(const Problem& p) {
  return 4 * chunk_of(p) + 16 / static_cast<int>(sizeof(A));
}

// Plans samples [first, first + count) of the group's unit.
// With `kWeighsAll`, samples without a corner keep their weight, which the gradient of a softmax needs. Without it they
// weigh 0, because an infinite weight times 0 would be NaN.
template <bool kWeighsAll, class A, class C>
__device__ __forceinline__ void plan(const Problem& p, const Unit& unit, const Attention<A, C>& attention, int first,
                                     int count, Sample<A>* samples) {
  int level = static_cast<int>(p.level_of(first));
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    Sample<A> sample = {-1, 0, 0, 0};
    if (unit.valid) {
      const int s = first + i;
      while (s >= static_cast<int>(p.first_sample(level + 1))) ++level;
      const A weight = attention(s);  // first, so that its load overlaps with those of the cell
      const Level shape = level_of(p, level);
      sample = sample_of(cell_of<A, C>(p, unit.row, unit.index * p.samples() + s, level, shape), shape, weight);
      if (!kWeighsAll && sample.key < 0) sample.weight = 0;
    }
    samples[i] = sample;
  }
}

// Calls f(i, width of its level) for sample first + i, i < count. The loads of kTogether samples overlap.
template <int kTogether, class F>
__device__ __forceinline__ void for_each_sample(const Problem& p, int first, int count, const F& f) {
  for (int i = 0, level = static_cast<int>(p.level_of(first)); i < count; ++level) {
    const int32_t width = static_cast<int32_t>(p.spatial_shapes[2 * level + 1]);
    const int next = static_cast<int>(p.first_sample(level + 1)) - first, end = next < count ? next : count;
#pragma unroll kTogether
    for (; i < end; ++i) f(i, width);
  }
}

template <class T, class C, int N>
__global__ void __launch_bounds__(kForwardThreads<T>, kForwardBlocks<T>)
    forward_kernel(const Problem p, unsigned tiles, T* __restrict__ output) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = blockDim.x, channels = static_cast<int>(p.channels), all = static_cast<int>(p.samples());
  const Unit unit = unit_of(p, tiles);
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory) + threadIdx.y * samples_per_unit<A>(p);
  const Attention<A, C> attention(p, unit, lanes);
  const T* rows = static_cast<const T*>(p.value) + (unit.image * p.keys * p.heads + unit.head) * p.channels;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));

  for (int c0 = 0; c0 < channels; c0 += lanes * N) {
    const int c = c0 + threadIdx.x * N;
    const bool active = c < channels;
    A sum[N] = {};
    for (int first = 0; first < all; first += kChunk) {
      const int count = all - first < kChunk ? all - first : kChunk;
      __syncwarp();
      plan<false>(p, unit, attention, first, count, samples);
      __syncwarp();
      for_each_sample<N <= 4 ? 2 : 1>(p, first, count, [&](int i, int32_t width) {
        const Corners<A> corners(samples[i], width);
        A x[4][N] = {};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
          if (corners.exists[corner] && active) load(row_at(rows + c, corners.key[corner], row_bytes), x[corner]);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += corners.weight[corner] * x[corner][j];
      });
    }
    if (active && unit.valid) store(output + unit.index * p.channels + c, sum);
  }
}

// Sums four numbers over a group in log2(lanes) + 2 shuffles: each lane passes on the numbers that other lanes sum.
template <class A>
__device__ __forceinline__ void store_group_sums(const A (&x)[4], int lanes, A* target) {
  if (lanes < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A sum = group_sum(x[i], lanes);
      if (threadIdx.x == 0) target[i] = sum;
    }
    return;
  }
  const int half = lanes / 2, quarter = lanes / 4;
  const bool second = (threadIdx.x & half) != 0, odd = (threadIdx.x & quarter) != 0;
  const A low = (second ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, second ? x[0] : x[2], half);
  const A high = (second ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, second ? x[1] : x[3], half);
  const A sum = group_sum((odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, quarter), quarter);
  if (threadIdx.x % quarter == 0) target[threadIdx.x / quarter] = sum;
}

// Samples [first, first + count) of the group's unit in the backward pass, in shared memory: as planned, and four
// numbers each, which are first the dots of grad_output with the corners, then the gradients of location and box.
template <class A>
struct Chunk {
  Sample<A>* samples;
  A* dots;
  int first, count;
};

// The gradient of the output at the channels of a lane. It stays in registers if the lanes cover all channels.
template <class T, int N>
struct OutputGradient {
  using A = typename AccumulatorOf<T>::type;
  const T* source;
  int channels;  // of the unit; 0 without one
  bool covered;
  A x[N] = {};

  __device__ __forceinline__ OutputGradient(const Problem& p, const Gradients& g, const Unit& unit)
      : source(static_cast<const T*>(g.output) + unit.index * p.channels),
        channels(unit.valid ? static_cast<int>(p.channels) : 0), covered(p.channels <= blockDim.x * N) {
    if (covered && static_cast<int>(threadIdx.x) * N < channels) load(source + threadIdx.x * N, x);
  }
};

// Fills chunk.dots with the dots. With kAtomic and `adds`, also adds to the gradient of the value. `rows` and
// `grad_value` begin at the first key of the unit's image and head.
template <bool kAtomic, class T, int N, class A>
__device__ __forceinline__ void corner_dots(const Problem& p, const Chunk<A>& chunk, OutputGradient<T, N>& grad,
                                            const T* rows, A* grad_value, bool adds) {
  constexpr int kWidening = sizeof(A) / sizeof(T);
  const int lanes = blockDim.x;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));
  for_each_sample<1>(p, chunk.first, chunk.count, [&](int i, int32_t width) {
    const Corners<A> corners(chunk.samples[i], width);
    A dot[4] = {};
    for (int c = threadIdx.x * N; c < grad.channels; c += lanes * N) {
      if (!grad.covered) load(grad.source + c, grad.x);
      A x[4][N] = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        if (corners.exists[corner]) load(row_at(rows + c, corners.key[corner], row_bytes), x[corner]);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          dot[corner] += grad.x[j] * x[corner][j];
          x[corner][j] = corners.weight[corner] * grad.x[j];
        }
        if (kAtomic && adds && corners.exists[corner])
          atomic_add<N>(row_at(grad_value + c, corners.key[corner], row_bytes * kWidening), x[corner]);
      }
    }
    store_group_sums(dot, lanes, chunk.dots + 4 * i);
  });
}

// From the dots to the gradients of the operator's arguments: writes those of coordinates and weights, and leaves those
// of location and box in chunk.dots. `mean` is the mean of the weights' gradients, which the softmax subtracts.
template <class C, class A>
__device__ __forceinline__ void chain_rule(const Problem& p, const Gradients& g, const Unit& unit,
                                           const Chunk<A>& chunk, A mean, A* attention_out) {
  const int lanes = blockDim.x;
  for (int i = threadIdx.x; i < chunk.count && unit.valid; i += lanes) {
    const int s = chunk.first + i, level = static_cast<int>(p.level_of(s));
    const int64_t index = unit.index * p.samples() + s;
    const Level shape = level_of(p, level);
    const A attention_weight = chunk.samples[i].weight;
    const bool inside = chunk.samples[i].key >= 0;
    A* d = chunk.dots + 4 * i;
    const SampleGradient<A> grad = gradient_of(cell_of<A, C>(p, unit.row, index, level, shape), d);
    const A pixel_x = inside ? grad.x * attention_weight : A(0);
    const A pixel_y = inside ? grad.y * attention_weight : A(0);
    const A location_x = pixel_x * static_cast<A>(shape.width), location_y = pixel_y * static_cast<A>(shape.height);
    A x = location_x, y = location_y, weight = grad.weight;
    if (p.reference_size != 0) {
      weight = attention_weight * (grad.weight - mean);
      d[0] = location_x;
      d[1] = location_y;
      d[2] = d[3] = 0;
      if (p.reference_size == 2) {
        x = pixel_x;
        y = pixel_y;
      } else if (inside) {
        const C* offset = static_cast<const C*>(p.coordinates) + 2 * index;
        const A box_unit = A(0.5) / static_cast<A>(p.points_on(level));
        A box[4];
        load_reference<A, C>(p, unit.row, level, box);
        x = location_x * box[2] * box_unit;
        y = location_y * box[3] * box_unit;
        d[2] = location_x * widen<A>(offset[0]) * box_unit;
        d[3] = location_y * widen<A>(offset[1]) * box_unit;
      }
      if (attention_out != nullptr) attention_out[index] = attention_weight;
    }
    static_cast<C*>(g.weights)[index] = narrow<C>(weight);
    static_cast<C*>(g.coordinates)[2 * index] = narrow<C>(x);
    static_cast<C*>(g.coordinates)[2 * index + 1] = narrow<C>(y);
  }
}

// Adds the chunk to this head's part of the gradient of the reference points. A level may begin in an earlier chunk.
template <class A>
__device__ __forceinline__ void reference_parts(const Problem& p, const Unit& unit, const Chunk<A>& chunk, A* parts) {
  const int lanes = blockDim.x, last = chunk.first + chunk.count, last_level = static_cast<int>(p.level_of(last - 1));
  const int first_level = static_cast<int>(p.level_of(chunk.first));
  for (int level = first_level + threadIdx.x; level <= last_level && unit.valid; level += lanes) {
    const int start = static_cast<int>(p.first_sample(level)), stop = static_cast<int>(p.first_sample(level + 1));
    const int begin = start > chunk.first ? start : chunk.first, end = stop < last ? stop : last;
    A* part =
        parts + (((unit.image * p.heads + unit.head) * p.queries + unit.query) * p.levels + level) * p.reference_size;
    for (int f = 0; f < p.reference_size; ++f) {
      A sum = begin == start ? A(0) : part[f];
      for (int s = begin; s < end; ++s) sum += chunk.dots[4 * (s - chunk.first) + f];
      part[f] = sum;
    }
  }
}

// The gradients of coordinates and weights, and with kAtomic that of the value, summed into `grad_value`.
template <class T, class C, int N, bool kAtomic>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Problem p, const Gradients g, unsigned tiles,
                    typename AccumulatorOf<T>::type* __restrict__ grad_value,
                    typename AccumulatorOf<T>::type* __restrict__ parts,
                    typename AccumulatorOf<T>::type* __restrict__ attention_out) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = blockDim.x, all = static_cast<int>(p.samples());
  const bool fused = p.reference_size != 0;
  const Unit unit = unit_of(p, tiles);
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory);
  A* dots = reinterpret_cast<A*>(samples + blockDim.y * samples_per_unit<A>(p)) + threadIdx.y * dots_per_unit<A>(p);
  samples += threadIdx.y * samples_per_unit<A>(p);
  const Attention<A, C> attention(p, unit, lanes);
  const int64_t base = (unit.image * p.keys * p.heads + unit.head) * p.channels;
  const T* rows = static_cast<const T*>(p.value) + base;
  OutputGradient<T, N> grad(p, g, unit);

  // The gradient of a logit needs the mean of the weights' gradients over all samples of the unit. If these do not fit
  // in one chunk, a first pass computes it.
  A mean = 0;
  const bool several = all > kChunk;
  for (int pass = fused && several ? 0 : 1; pass < 2; ++pass) {
    for (int first = 0; first < all; first += kChunk) {
      const Chunk<A> chunk = {samples, dots, first, all - first < kChunk ? all - first : kChunk};
      __syncwarp();
      plan<true>(p, unit, attention, first, chunk.count, samples);
      __syncwarp();
      corner_dots<kAtomic>(p, chunk, grad, rows, grad_value + base, pass == 1);
      __syncwarp();
      if (fused && (pass == 0 || !several)) {
        A part = 0;
        for (int i = threadIdx.x; i < chunk.count && unit.valid; i += lanes) {
          const int s = first + i, level = static_cast<int>(p.level_of(s));
          const Cell<A, int32_t> cell =
              cell_of<A, C>(p, unit.row, unit.index * p.samples() + s, level, level_of(p, level));
          part += samples[i].weight * gradient_of(cell, dots + 4 * i).weight;
        }
        mean += group_sum(part, lanes);
      }
      if (pass == 0) continue;
      chain_rule<C>(p, g, unit, chunk, mean, attention_out);
      if (!fused) continue;
      __syncwarp();
      reference_parts(p, unit, chunk, parts);
    }
  }
}

template <class A, class R>
__global__ void __launch_bounds__(kThreads) sum_over_heads_kernel(const Problem p, const A* parts, R* grad_reference) {
  const int64_t features = p.levels * p.reference_size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.batch * p.queries * features) return;
  const int64_t image = i / (p.queries * features), rest = i % (p.queries * features);
  A sum = 0;
  for (int64_t head = 0; head < p.heads; ++head) sum += parts[(image * p.heads + head) * p.queries * features + rest];
  grad_reference[i] = narrow<R>(sum);
}

struct Shape {
  dim3 grid, block;
  unsigned tiles;  // blocks of an image and head
  size_t shared_bytes;
};

// Groups of up to `vectors` lanes, or more if the shared memory of one warp does not hold as many units. Blocks are as
// large as the shared memory allows, or smaller if they are few.
Shape shape_for(const Problem& p, int64_t vectors, unsigned threads, size_t bytes_per_unit) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  unsigned units = threads / lanes;
  const auto tiles = [&] { return (p.queries + units - 1) / units; };
  while (units * lanes > 64 && p.batch * p.heads * tiles() < kManyBlocks) units /= 2;
  for (; units * bytes_per_unit > kSharedBytes; units /= 2)
    if (units * lanes == 32) lanes *= 2;
  return {dim3(static_cast<unsigned>(p.batch * p.heads * tiles())), dim3(lanes, units), static_cast<unsigned>(tiles()),
          units * bytes_per_unit};
}

template <class T, int N>
Shape forward_shape(const Problem& p) {
  using A = typename AccumulatorOf<T>::type;
  return shape_for(p, (p.channels + N - 1) / N, kForwardThreads<T>, samples_per_unit<A>(p) * sizeof(Sample<A>));
}

template <class T, int N>
Shape backward_shape(const Problem& p) {
  using A = typename AccumulatorOf<T>::type;
  return shape_for(p, (p.channels + N - 1) / N, kThreads,
                   samples_per_unit<A>(p) * sizeof(Sample<A>) + dots_per_unit<A>(p) * sizeof(A));
}

template <class T, class C, int N>
cudaError_t forward_as(const Problem& p, void* output, cudaStream_t stream) {
  const Shape shape = forward_shape<T, N>(p);
  if (shape.grid.x == 0) return cudaSuccess;
  MSDA_LAUNCH((forward_kernel<T, C, N>), shape.grid, shape.block, shape.shared_bytes, stream, p, shape.tiles,
              static_cast<T*>(output));
  return cudaGetLastError();
}

template <class T, class C, int N>
cudaError_t backward_as(const Problem& p, const Gradients& g, const Scratch& scratch, bool deterministic,
                        cudaStream_t stream) {
  using A = typename AccumulatorOf<T>::type;
  A* const grad_value = static_cast<A*>(scratch.value != nullptr ? scratch.value : g.value);
  A* const parts = static_cast<A*>(scratch.reference_points);
  A* const attention = static_cast<A*>(scratch.attention);
  const int64_t elements = p.batch * p.keys * p.heads * p.channels;
  if (!deterministic && elements != 0) {  // without elements, the pointer is null
    const cudaError_t error = cudaMemsetAsync(grad_value, 0, elements * sizeof(A), stream);
    if (error != cudaSuccess) return error;
  }
  const Shape shape = backward_shape<T, N>(p);
  if (shape.grid.x != 0) {
    const auto kernel = deterministic ? backward_kernel<T, C, N, false> : backward_kernel<T, C, N, true>;
    MSDA_LAUNCH(kernel, shape.grid, shape.block, shape.shared_bytes, stream, p, g, shape.tiles, grad_value, parts,
                attention);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    if (p.reference_size != 0) {
      const int64_t count = p.batch * p.queries * p.levels * p.reference_size;
      const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
      if (p.wide_reference)
        MSDA_LAUNCH((sum_over_heads_kernel<A, A>), grid, dim3(kThreads), 0, stream, p, parts,
                    static_cast<A*>(g.reference_points));
      else
        MSDA_LAUNCH((sum_over_heads_kernel<A, C>), grid, dim3(kThreads), 0, stream, p, parts,
                    static_cast<C*>(g.reference_points));
      error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
  }
  if (!deterministic) return cudaSuccess;
  return ordered_value_gradient<T, C, N>(p, g, scratch, static_cast<int>(shape.block.x), stream);
}

// Calls f(T, C, vector width): 16 bytes of channels per lane if the channels and the pointers allow it, else 1.
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

int64_t sort_elements(const Problem& problem) { return SortBuffers(problem, nullptr).used; }

cudaError_t forward(const Problem& problem, void* output, cudaStream_t stream) {
  return dispatch(problem, reinterpret_cast<uintptr_t>(output), [&](auto t, auto c, auto width) {
    return forward_as<decltype(t), decltype(c), decltype(width)::value>(problem, output, stream);
  });
}

cudaError_t backward(const Problem& problem, const Gradients& gradients, const Scratch& scratch, bool deterministic,
                     cudaStream_t stream) {
  const uintptr_t pointers = reinterpret_cast<uintptr_t>(gradients.output) |
                             reinterpret_cast<uintptr_t>(gradients.value) | reinterpret_cast<uintptr_t>(scratch.value);
  return dispatch(problem, pointers, [&](auto t, auto c, auto width) {
    return backward_as<decltype(t), decltype(c), decltype(width)::value>(problem, gradients, scratch, deterministic,
                                                                         stream);
  });
}

}  // namespace msda::cuda
