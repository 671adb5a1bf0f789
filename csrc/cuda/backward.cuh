// The backward kernel. The lanes of a group take as many samples at a time as there are lanes: each lane plans one
// sample, then the group computes the dots of the samples with the gradient of the output, and each lane turns the dots
// of its sample into gradients.
#pragma once

#include "block_sums.cuh"
#include "units.cuh"

namespace msda::cuda {
namespace {

// The gradient of a logit needs the mean of the gradients of all attention weights of the unit. Up to this many of them
// wait for it in shared memory; with more samples, a first pass computes the mean.
constexpr int kWaiting = 32;

// The sample that a lane has planned.
template <class A>
struct LaneSample {
  int level = 0;
  int64_t index = -1;  // of the sample in the tensors; -1 if there is none
  Level shape = {0, 0, 0};
  Cell<A, int32_t> cell = {-2, -2, 0, 0};
  A weight = 0;

  __device__ __forceinline__ bool inside() const { return any_exists(cell.row, shape); }

  __device__ __forceinline__ bool exists(int corner) const {
    return inside() && corner_exists(cell, corner, shape.height, shape.width);
  }

  // The key of a corner, or of the nearest pixel of the level if the corner does not exist; 0 if no corner exists.
  __device__ __forceinline__ int32_t key(int corner) const {
    if (!inside()) return 0;
    const int32_t row = cell.row + corner / 2, column = cell.column + corner % 2;
    return shape.start + (row < 0 ? 0 : row < shape.height ? row : shape.height - 1) * shape.width +
           (column < 0 ? 0 : column < shape.width ? column : shape.width - 1);
  }
};

template <class A, class C>
__device__ __forceinline__ LaneSample<A> lane_sample(const Problem& p, const Unit& unit,
                                                     const Attention<A, C>& attention, int s) {
  LaneSample<A> sample;
  if (!unit.valid || s >= p.samples()) return sample;
  sample.level = static_cast<unsigned>(s) / static_cast<unsigned>(p.points);
  sample.index = unit.index * p.samples() + s;
  sample.weight = attention(s);  // first, so that its load overlaps with those of the cell
  sample.shape = level_of(p, sample.level);
  sample.cell = cell_of<A, C>(p, unit.row, sample.index, sample.level, sample.shape);
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

// Writes the dots of four pixels per sample with the gradient of the output. `rows` begins at the first key of the
// unit's image and head.
template <int kLanes, class T, int N, class A>
__device__ __forceinline__ void corner_dots(int count, const Pack<int32_t, 4>* keys, const T* grad_output,
                                            int channels, int32_t row_bytes, const T* rows, A* dots) {
  const int lanes = kLanes > 0 ? kLanes : blockDim.x, lane = threadIdx.x;
  A grad[N] = {}, x[4][N];
  const auto add_dots = [&](const Pack<int32_t, 4>& key, int c, A(&dot)[4]) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) load(row_at(rows + c, key.x[corner], row_bytes), x[corner]);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
#pragma unroll
      for (int j = 0; j < N; ++j) dot[corner] += grad[j] * x[corner][j];
  };
  const bool covered = kLanes > 0 || channels <= lanes * N;
  if (kLanes > 0 || (covered && lane * N < channels)) load(grad_output + lane * N, grad);
  for (int i = 0; i < count; ++i) {
    A dot[4] = {};
    if constexpr (kLanes > 0) {
      add_dots(keys[i], lane * N, dot);
    } else {
      for (int c = lane * N; c < channels; c += lanes * N) {
        if (!covered) load(grad_output + c, grad);
        add_dots(keys[i], c, dot);
      }
    }
    store_group_sums(dot, lanes, dots + 4 * i);
  }
}

// The gradients of a sample with respect to the operator's arguments. `moves` has the gradients of location and box.
template <class A>
struct ArgumentGradient {
  A x, y, weight, moves[4];
};

template <class C, class A>
__device__ __forceinline__ ArgumentGradient<A> chain_rule(const Problem& p, const Unit& unit,
                                                          const LaneSample<A>& sample, const A (&dots)[4]) {
  A d[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) d[corner] = sample.exists(corner) ? dots[corner] : A(0);
  const SampleGradient<A> grad = sample_gradient(sample.cell.down, sample.cell.right, d[0], d[1], d[2], d[3]);
  const bool inside = sample.inside();  // else an infinite weight times 0 would be NaN
  const A pixel_x = inside ? grad.x * sample.weight : A(0), pixel_y = inside ? grad.y * sample.weight : A(0);
  const A x = pixel_x * static_cast<A>(sample.shape.width), y = pixel_y * static_cast<A>(sample.shape.height);
  if (p.reference_size == 0) return {x, y, grad.weight, {}};
  if (p.reference_size == 2) return {pixel_x, pixel_y, grad.weight, {x, y, 0, 0}};
  if (!inside) return {0, 0, grad.weight, {}};
  const A unit_of_box = A(0.5) / static_cast<A>(p.points);
  const C* offset = static_cast<const C*>(p.coordinates) + 2 * sample.index;
  A box[4];
  load_reference<A, C>(p, unit.row, sample.level, box);
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
  const unsigned points = static_cast<unsigned>(p.points);
  const int lanes = blockDim.x, last = first + count, last_level = (last - 1) / points;
  for (int level = first / points + threadIdx.x; level <= last_level && unit.valid; level += lanes) {
    const int start = level * points, stop = start + points;
    const int begin = start > first ? start : first, end = stop < last ? stop : last;
    A* part =
        parts + (((unit.image * p.heads + unit.head) * p.queries + unit.query) * p.levels + level) * p.reference_size;
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

// The shared memory of a block. What belongs to a group is padded, so that the groups of a warp use different banks.
template <class T, int N>
MSDA_INLINE int64_t backward_bytes(const Problem& p, int lanes, int units, bool atomic) {
  using A = typename AccumulatorOf<T>::type;
  const int64_t per_unit = (lanes + 1) * static_cast<int64_t>(sizeof(Pack<int32_t, 4>) + sizeof(Pack<A, 4>)) +
                           (waiting(p) + 1) * static_cast<int64_t>(sizeof(Pack<A, 2>));
  return units * per_unit + (atomic ? BlockSums<T, N>::bytes(units * lanes) : 0);
}

// The gradients of coordinates and weights, and with kAtomic that of the value, summed into `grad_value`. With kLanes,
// a group has this many lanes, whose channels are those of the value.
template <class T, class C, int N, bool kAtomic, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const Problem p, const Gradients g, int32_t first_image,
                    typename AccumulatorOf<T>::type* __restrict__ grad_value,
                    typename AccumulatorOf<T>::type* __restrict__ parts,
                    typename AccumulatorOf<T>::type* __restrict__ attention_out) {
  using A = typename AccumulatorOf<T>::type;
  const int lanes = kLanes > 0 ? kLanes : blockDim.x, lane = threadIdx.x, all = static_cast<int>(p.samples());
  const bool fused = p.reference_size != 0, waits = waiting(p) != 0;
  const int channels = kLanes > 0 ? kLanes * N : p.keys > 0 ? static_cast<int>(p.channels) : 0;
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));
  const Unit unit = unit_of(p, first_image);

  auto* const all_dots = reinterpret_cast<Pack<A, 4>*>(
      shared_memory + (kAtomic ? BlockSums<T, N>::bytes(blockDim.x * blockDim.y) : 0));
  auto* const all_keys = reinterpret_cast<Pack<int32_t, 4>*>(all_dots + blockDim.y * (lanes + 1));
  auto* const all_waiting = reinterpret_cast<Pack<A, 2>*>(all_keys + blockDim.y * (lanes + 1));
  A* const dots = reinterpret_cast<A*>(all_dots + threadIdx.y * (lanes + 1));
  Pack<int32_t, 4>* const keys = all_keys + threadIdx.y * (lanes + 1);
  Pack<A, 2>* const weights = all_waiting + threadIdx.y * (waiting(p) + 1);  // and their gradients

  const Attention<A, C> attention(p, unit, lanes);
  const T* const grad_output = static_cast<const T*>(g.output) + unit.index * p.channels;
  const int64_t base = (unit.image * p.keys * p.heads + unit.head) * p.channels;
  const T* const rows = static_cast<const T*>(p.value) + base;

  A part = 0, mean = 0;  // of this lane's samples; of the unit
  for (int pass = fused && !waits ? 0 : 1; pass < 2; ++pass) {
    for (int first = 0; first < all; first += lanes) {
      const int count = all - first < lanes ? all - first : lanes;
      const LaneSample<A> sample = lane_sample(p, unit, attention, first + lane);
      Pack<int32_t, 4> key;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) key.x[corner] = sample.key(corner);
      __syncwarp();  // the dots of the last samples are read
      keys[lane] = key;
      __syncwarp();
      corner_dots<kLanes, T, N>(count, keys, grad_output, channels, row_bytes, rows, dots);
      __syncwarp();
      ArgumentGradient<A> grad = {};
      if (sample.index >= 0) {
        A d[4];
        load(dots + 4 * lane, d);
        grad = chain_rule<C>(p, unit, sample, d);
        part += sample.weight * grad.weight;
      }
      if (pass == 0) continue;
      if (sample.index >= 0) {
        if (waits)
          weights[first + lane] = {sample.weight, grad.weight};
        else
          static_cast<C*>(g.weights)[sample.index] =
              narrow<C>(fused ? sample.weight * (grad.weight - mean) : grad.weight);
        static_cast<C*>(g.coordinates)[2 * sample.index] = narrow<C>(grad.x);
        static_cast<C*>(g.coordinates)[2 * sample.index + 1] = narrow<C>(grad.y);
        if (attention_out != nullptr) attention_out[sample.index] = sample.weight;
      }
      if (fused) {
        store(dots + 4 * lane, grad.moves);
        __syncwarp();
        reference_parts(p, unit, first, count, dots, parts);
      }
      if constexpr (kAtomic) {
        bool exists[4];
        A weight[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          exists[corner] = sample.exists(corner);
          weight[corner] = corner_weight(sample.cell.down, sample.cell.right, corner) * sample.weight;
        }
        BlockSums<T, N>(shared_memory).add(exists, key.x, weight, grad_output, grad_value + base, channels,
                 row_bytes * static_cast<int>(sizeof(A) / sizeof(T)));
      }
    }
    if (pass == 0 || waits) mean = group_sum(part, lanes);
  }
  if (!waits || !unit.valid) return;
  for (int s = lane; s < all; s += lanes)  // those of this lane
    static_cast<C*>(g.weights)[unit.index * p.samples() + s] = narrow<C>(weights[s].x[0] * (weights[s].x[1] - mean));
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
