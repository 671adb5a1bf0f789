// The backward kernel. The lanes of a group take as many samples at a time as there are lanes: each lane plans one
// sample, then the group computes the dots of the samples with the gradient of the output, and each lane turns the dots
// of its sample into gradients.
#pragma once

#include "block_sums.cuh"
#include "mma.cuh"
#include "units.cuh"

namespace msda::cuda {
namespace {

// The gradient of a logit needs the mean of the gradients of all attention weights of the unit. Up to this many of them
// wait for it in shared memory; with more samples, a first pass computes the mean.
constexpr int kWaiting = 32;

// Threads of a block, and how many blocks fit on a multiprocessor at least. Where samples are added up within a block,
// it has 64 units of 32 channels.
template <class T, int kLanes, bool kAtomic>
constexpr bool kLargeBlock = sizeof(T) == 4 && kLanes == 8 && kAtomic;
template <class T, int kLanes, bool kAtomic>
constexpr int kBackwardThreads = kLargeBlock<T, kLanes, kAtomic> ? 512 : 256;
template <class T, int kLanes, bool kAtomic>
constexpr int kBackwardBlocks = kLargeBlock<T, kLanes, kAtomic> || kLanes == 0 ? 2 : 3;

// The sample that a lane has planned.
template <class A>
struct LaneSample {
  bool valid = false;             // whether there is one
  unsigned corners = 0;           // bit i: whether corner i exists
  int32_t height = 0, width = 0;  // of its level
  A down = 0, right = 0, weight = 0;

  __device__ __forceinline__ bool exists(int corner) const { return (corners >> corner & 1) != 0; }
};

// Plans sample s of the group's unit, and stores the keys of its corners. Where a corner does not exist, that is the
// key of the nearest pixel of the level, or 0 if no corner exists.
template <class A, class C>
__device__ __forceinline__ LaneSample<A> lane_sample(const Problem& p, const Unit& unit,
                                                     const Attention<A, C>& attention, int s, int32_t* keys) {
  LaneSample<A> sample;
  int32_t key[4] = {};
  sample.valid = unit.valid && s < p.samples();
  if (sample.valid) {
    sample.weight = attention(s);  // first, so that its load overlaps with those of the cell
    const int level = static_cast<int>(p.level_of(s));
    const Level shape = level_of(p, level);
    const Cell<A, int32_t> cell = cell_of<A, C>(p, unit.row(p), unit.index(p) * p.samples() + s, level, shape);
    sample.height = shape.height;
    sample.width = shape.width;
    sample.down = cell.down;
    sample.right = cell.right;
    if (any_exists(cell.row, shape)) {
      const bool above = cell.row >= 0, below = cell.row + 1 < shape.height;
      const bool before = cell.column >= 0, after = cell.column + 1 < shape.width;
      sample.corners =
          (above && before ? 1 : 0) | (above && after ? 2 : 0) | (below && before ? 4 : 0) | (below && after ? 8 : 0);
      const int32_t row = shape.start + (above ? cell.row : 0) * shape.width;
      const int32_t next_row = above && below ? row + shape.width : row;
      const int32_t column = before ? cell.column : 0, next_column = before && after ? column + 1 : column;
      key[0] = row + column;
      key[1] = row + next_column;
      key[2] = next_row + column;
      key[3] = next_row + next_column;
    }
  }
  store(keys, key);
  return sample;
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
  target[threadIdx.x / quarter] = sum;  // by several lanes, because a condition would cost more
}

// Writes the dots of four pixels per sample with the gradient of the output. The loads of kTogether samples overlap, as
// far as the registers allow. `rows` begins at the first key of the unit's image and head.
template <int kLanes, int kTogether, class T, int N, class A>
__device__ __forceinline__ void corner_dots(int count, const int32_t* keys, const T* grad_output, int channels,
                                            int32_t row_bytes, const T* rows, A* dots) {
  const int lanes = kLanes > 0 ? kLanes : blockDim.x, lane = threadIdx.x;
  A grad[N] = {}, x[4][N];
  const auto add_dots = [&](const int32_t (&key)[4], int c, A(&dot)[4]) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) load(row_at(rows + c, key[corner], row_bytes), x[corner]);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
#pragma unroll
      for (int j = 0; j < N; ++j) dot[corner] += grad[j] * x[corner][j];
  };
  const bool covered = kLanes > 0 || channels <= lanes * N;
  if (kLanes > 0 || (covered && lane * N < channels)) load(grad_output + lane * N, grad);
#pragma unroll kTogether
  for (int i = 0; i < count; ++i) {
    int32_t key[4];
    load(keys + 4 * i, key);
    A dot[4] = {};
    if constexpr (kLanes > 0) {
      add_dots(key, lane * N, dot);
    } else {
      for (int c = lane * N; c < channels; c += lanes * N) {
        if (!covered) load(grad_output + c, grad);
        add_dots(key, c, dot);
      }
    }
    store_group_sums(dot, lanes, dots + 4 * i);
  }
}

// The same on tensor cores, for 16-bit values and a group of 4 or 8 lanes with 8 channels each. Of the operands of the
// instruction, lane 4 * g + t holds rows g and g + 8 of the values, which are two corners, and column g of the
// gradients of the output, which is that of its unit: of all three, the lane's channels. So element (g, g) of the
// result is the dot of the first corner, and (g + 8, g) that of the second one. The lane with t = g / 2 gets both.
template <int kLanes, class T>
__device__ __forceinline__ void tensor_core_corner_dots(int count, const int32_t* keys, const T* grad_output,
                                                        int32_t row_bytes, const T* rows, float* dots) {
  const int lane = threadIdx.x, g = ((threadIdx.y * kLanes + lane) & 31) / 4, t = lane % 4;
  uint32_t grad[4];
  load(reinterpret_cast<const uint32_t*>(grad_output + 8 * lane), grad);
  const auto* const own = reinterpret_cast<const uint32_t*>(rows + 8 * lane);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    int32_t key[4];
    load(keys + 4 * i, key);
    uint32_t x[4][4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) load(row_at(own, key[corner], row_bytes), x[corner]);
    float dot[4];
#pragma unroll
    for (int corner = 0; corner < 4; corner += 2) {
      const auto& upper = x[corner];
      const auto& lower = x[corner + 1];
      float sum[4] = {};
      multiply_add<T>(sum, {upper[0], lower[0], upper[1], lower[1]}, {grad[0], grad[1]});
      multiply_add<T>(sum, {upper[2], lower[2], upper[3], lower[3]}, {grad[2], grad[3]});
      dot[corner] = g % 2 != 0 ? sum[1] : sum[0];
      dot[corner + 1] = g % 2 != 0 ? sum[3] : sum[2];
    }
    if constexpr (kLanes == 8) {  // each half of the group has the products of half of the channels
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) dot[corner] += __shfl_xor_sync(kAllLanes, dot[corner], 4);
    }
    if (t == g / 2) store(dots + 4 * i, dot);
  }
}

template <class A>
__device__ __forceinline__ ValueSample<A> value_sample(const LaneSample<A>& sample, int32_t query) {
  const uint32_t only_lower = (sample.corners & 3) == 0 ? kOnlyLower : 0;
  const uint32_t only_right = (sample.corners & 5) == 0 ? kOnlyRight : 0;
  return {sample.down, sample.right, sample.weight, static_cast<uint32_t>(query) | only_lower | only_right};
}

// The gradients of a sample with respect to the operator's arguments. `moves` has the gradients of location and box.
template <class A>
struct ArgumentGradient {
  A x, y, weight, moves[4];
};

template <class C, class A>
__device__ __forceinline__ ArgumentGradient<A> chain_rule(const Problem& p, const Unit& unit, int s,
                                                          const LaneSample<A>& sample, const A (&dots)[4]) {
  A d[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) d[corner] = sample.exists(corner) ? dots[corner] : A(0);
  const SampleGradient<A> grad = sample_gradient(sample.down, sample.right, d[0], d[1], d[2], d[3]);
  const bool inside = sample.corners != 0;  // else an infinite weight times 0 would be NaN
  const A pixel_x = inside ? grad.x * sample.weight : A(0), pixel_y = inside ? grad.y * sample.weight : A(0);
  const A x = pixel_x * static_cast<A>(sample.width), y = pixel_y * static_cast<A>(sample.height);
  if (p.reference_size == 0) return {x, y, grad.weight, {}};
  if (p.reference_size == 2) return {pixel_x, pixel_y, grad.weight, {x, y, 0, 0}};
  if (!inside) return {0, 0, grad.weight, {}};
  const int level = static_cast<int>(p.level_of(s));
  const A unit_of_box = A(0.5) * reciprocal(static_cast<A>(p.points_on(level)));
  const C* offset = static_cast<const C*>(p.coordinates) + 2 * (unit.index(p) * p.samples() + s);
  A box[4];
  load_reference<A, C>(p, unit.row(p), level, box);
  return {x * box[2] * unit_of_box,
          y * box[3] * unit_of_box,
          grad.weight,
          {x, y, x * widen<A>(offset[0]) * unit_of_box, y * widen<A>(offset[1]) * unit_of_box}};
}

// Adds samples [first, first + count) to this head's part of the gradient of the reference points, from their gradients
// of location and box. A level may begin with an earlier sample.
template <class A>
__device__ __forceinline__ void reference_parts(const Problem& p, const Unit& unit, int first, int count,
                                                const A* moves, A* parts) {
  const int last = first + count, last_level = static_cast<int>(p.level_of(last - 1));
  int level = static_cast<int>(p.level_of(first)) + threadIdx.x;
  for (; level <= last_level && unit.valid; level += blockDim.x) {
    const int start = static_cast<int>(p.first_sample(level)), stop = static_cast<int>(p.first_sample(level + 1));
    const int begin = start > first ? start : first, end = stop < last ? stop : last;
    A* part = parts +
              (((unit.image() * p.heads + unit.head()) * p.queries + unit.query) * p.levels + level) * p.reference_size;
    for (int f = 0; f < p.reference_size; ++f) {
      A sum = begin == start ? A(0) : part[f];
      for (int s = begin; s < end; ++s) sum += moves[4 * (s - first) + f];
      part[f] = sum;
    }
  }
}

MSDA_INLINE int waiting(const Problem& p) {
  return p.reference_size != 0 && p.samples() <= kWaiting ? static_cast<int>(p.samples()) : 0;
}

// The shared memory of a block. A group's keys and dots are padded, so that the groups of a warp use different banks;
// BlockSums reuses their memory.
template <class T, int N>
struct BackwardMemory {
  using A = typename AccumulatorOf<T>::type;

  MSDA_MEMBER static int waiting_bytes(const Problem& p, int units) {
    return (units * (waiting(p) + 1) * static_cast<int>(sizeof(A)) + 31) / 32 * 32;
  }
  MSDA_MEMBER static int64_t bytes(const Problem& p, int lanes, int units, bool atomic) {
    const int64_t groups = int64_t{units} * (lanes + 1) * static_cast<int>(sizeof(Pack<A, 4>) + 4 * sizeof(int32_t));
    const int64_t sums = atomic ? BlockSums<T, N>::bytes(units * lanes) : 0;
    return waiting_bytes(p, units) + (groups > sums ? groups : sums);
  }

  A *weights, *dots;  // gradients of the attention weights that wait; four numbers per lane
  int32_t* keys;      // four per lane
  unsigned char* sums;

  __device__ __forceinline__ explicit BackwardMemory(const Problem& p) {
    const int units = blockDim.y, unit = threadIdx.y, padded = blockDim.x + 1;
    sums = shared_memory + waiting_bytes(p, units);
    weights = reinterpret_cast<A*>(shared_memory) + unit * (waiting(p) + 1);
    dots = reinterpret_cast<A*>(sums) + 4 * unit * padded;
    keys = reinterpret_cast<int32_t*>(reinterpret_cast<A*>(sums) + 4 * units * padded) + 4 * unit * padded;
  }
};

// The gradients of coordinates and weights. With kAtomic, that of the value is summed into `grad_value`; without it,
// the samples are written in the order (image, head, query, sample), with the keys of the first pixels of their cells,
// or `p.keys` if there is none. With kLanes, a group has this many lanes, whose channels are those of the value.
template <class T, class C, int N, bool kAtomic, int kLanes>
__global__ void __launch_bounds__(kBackwardThreads<T, kLanes, kAtomic>, kBackwardBlocks<T, kLanes, kAtomic>)
    backward_kernel(const Problem p, const Gradients g, int32_t first_image,
                    typename AccumulatorOf<T>::type* __restrict__ grad_value,
                    typename AccumulatorOf<T>::type* __restrict__ parts,
                    ValueSample<typename AccumulatorOf<T>::type>* __restrict__ value_samples,
                    int32_t* __restrict__ value_keys) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = kLanes > 0 ? kLanes : blockDim.x, all = static_cast<int>(p.samples());
  const int lane = threadIdx.x & (kLanes > 0 ? kLanes - 1 : 31);  // the bits tell the compiler how small it is
  const bool fused = p.reference_size != 0, waits = waiting(p) != 0;
  const int channels = kLanes > 0 ? kLanes * N : p.keys > 0 ? static_cast<int>(p.channels) : 0;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));
  const Unit unit(p, first_image);
  const BackwardMemory<T, N> memory(p);
  const Attention<A, C> attention(p, unit, lanes);
  const T* const grad_output = static_cast<const T*>(g.output) + unit.index(p) * p.channels;

  A mean = 0;  // of the weights' gradients: at first this lane's part
  for (int pass = fused && !waits ? 0 : 1; pass < 2; ++pass) {
    for (int first = 0; first < all; first += lanes) {
      const int count = all - first < lanes ? all - first : lanes;
      __syncwarp();  // the dots of the last samples are read
      const LaneSample<A> sample = lane_sample(p, unit, attention, first + lane, memory.keys + 4 * lane);
      __syncwarp();
      const T* const rows = static_cast<const T*>(p.value) + unit.base(p);
      if constexpr (kSm80 && sizeof(T) == 2 && kLanes > 0) {
        tensor_core_corner_dots<kLanes>(count, memory.keys, grad_output, row_bytes, rows, memory.dots);
      } else {
        constexpr int kTogether = kSm80 && kAtomic && N <= 4 ? 2 : 1;
        corner_dots<kLanes, kTogether, T, N>(count, memory.keys, grad_output, channels, row_bytes, rows, memory.dots);
      }
      __syncwarp();
      ArgumentGradient<A> grad = {};
      if (sample.valid) {
        A dots[4];
        load(memory.dots + 4 * lane, dots);
        grad = chain_rule<C>(p, unit, first + lane, sample, dots);
        if (pass == 0 || waits) mean += sample.weight * grad.weight;
      }
      if (pass == 0) continue;
      if (sample.valid) {
        const int64_t index = unit.index(p) * p.samples() + first + lane;
        if (waits)
          memory.weights[first + lane] = grad.weight;
        else
          static_cast<C*>(g.weights)[index] = narrow<C>(fused ? sample.weight * (grad.weight - mean) : grad.weight);
        static_cast<C*>(g.coordinates)[2 * index] = narrow<C>(grad.x);
        static_cast<C*>(g.coordinates)[2 * index + 1] = narrow<C>(grad.y);
        if constexpr (!kAtomic) {
          const int64_t segment = unit.image() * p.heads + unit.head();
          const int64_t item = (segment * p.queries + unit.query) * p.samples() + first + lane;
          value_samples[item] = value_sample(sample, unit.query);
          value_keys[item] = sample.corners != 0 ? memory.keys[4 * lane] : static_cast<int32_t>(p.keys);
        }
      }
      if (fused) {
        store(memory.dots + 4 * lane, grad.moves);
        __syncwarp();
        reference_parts(p, unit, first, count, memory.dots, parts);
      }
      if constexpr (kAtomic) {
        int32_t key[4];
        load(memory.keys + 4 * lane, key);
        PixelPair<A> pairs[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const bool left = sample.exists(2 * i), right = sample.exists(2 * i + 1);
          pairs[i] = {key[2 * i] - (left ? 0 : 1), left, right,
                      corner_weight(sample.down, sample.right, 2 * i) * sample.weight,
                      corner_weight(sample.down, sample.right, 2 * i + 1) * sample.weight};
        }
        __syncthreads();  // before BlockSums reuses the memory of keys and dots
        BlockSums<T, N>(memory.sums)
            .add(pairs, grad_output, grad_value + unit.base(p), static_cast<int32_t>(p.keys) - 1, channels,
                 row_bytes * static_cast<int>(sizeof(A) / sizeof(T)));
      }
    }
    if (pass == 0 || waits) mean = group_sum(mean, lanes);
  }
  if (!waits || !unit.valid) return;
  for (int s = lane; s < all; s += lanes)  // those of this lane
    static_cast<C*>(g.weights)[unit.index(p) * p.samples() + s] = narrow<C>(attention(s) * (memory.weights[s] - mean));
}

// The gradient of the reference points: the sum of the heads' parts.
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

}  // namespace
}  // namespace msda::cuda
