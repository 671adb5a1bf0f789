// CUDA kernels of multi-scale deformable attention.
//
// A unit is one query of one head. A group of 2^k <= 32 lanes of a warp computes a unit, each lane with 16 bytes of
// channels, and a block computes units of one image and head, so that neighboring queries share the L1 cache. Tensor
// cores take four samples at a time, with four times as many lanes for a unit.
#include <algorithm>

#include "backward.cuh"
#include "forward.cuh"
#include "ms_deform_attn.h"
#include "ordered.cuh"
#include "tensor_core_forward.cuh"

namespace msda::cuda {
namespace {

constexpr int64_t kGrantedBytes = 48 * 1024;  // of shared memory, by default
constexpr int64_t kSharedBytes = 64 * 1024;   // every device grants these to a kernel that asks for them
constexpr int kManyBlocks = 1024;             // blocks are made smaller where there are fewer

struct Shape {
  dim3 block;
  int units_in_turn;  // that a group of lanes computes one after another
  unsigned tiles;     // blocks of an image and head
  size_t shared_bytes;
};

// Groups of up to `vectors` lanes, or more if the shared memory of one warp does not hold as many units. Blocks are as
// large as the shared memory allows, or smaller if they are few. `bytes` is the shared memory of lanes and units.
template <class Bytes>
Shape shape_for(const Problem& p, int64_t vectors, unsigned threads, int units_in_turn, const Bytes& bytes) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  unsigned units = threads / lanes;
  const auto tiles = [&] { return (p.queries + units * units_in_turn - 1) / (units * units_in_turn); };
  const auto few = [&] { return p.batch * p.heads * tiles() < kManyBlocks; };
  while (units_in_turn > 1 && few()) units_in_turn /= 2;
  while (units * lanes > 64 && few()) units /= 2;
  for (; bytes(lanes, units) > kSharedBytes; units /= 2)
    if (units * lanes == 32) lanes *= 2;
  return {dim3(lanes, units), units_in_turn, static_cast<unsigned>(tiles()), static_cast<size_t>(bytes(lanes, units))};
}

template <class T, int N>
Shape forward_shape(const Problem& p) {
  using Sample = PlannedSample<typename AccumulatorOf<T>::type>;
  return shape_for(p, (p.channels + N - 1) / N, kForwardThreads<T>, 1, [&](int, int units) {
    return int64_t{units} * (chunk_of(p) + 1) * static_cast<int64_t>(sizeof(Sample));
  });
}

// Whether the forward pass uses tensor cores, if the type and the alignment allow it. They need all samples of a unit
// in shared memory.
bool uses_tensor_cores(const Problem& p) {
  if (p.channels <= 8 || p.channels > 64 || p.samples() > 1024) return false;
  int device, major;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

template <class T>
Shape tensor_core_shape(const Problem& p) {
  return shape_for(p, p.channels / 2, kForwardThreads<T>, kUnitsInTurn, [&](int, int units) {
    return int64_t{units} * matrix_plan_size(p) * static_cast<int64_t>(sizeof(MatrixSample<T>));
  });
}

// The lanes of a backward kernel for exactly these channels, 0 if there is none.
template <int N>
int backward_lanes(const Problem& p) {
  const bool full = N >= 4 && p.keys > 0 && (p.channels == 4 * N || p.channels == 8 * N);
  return full ? static_cast<int>(p.channels / N) : 0;
}

template <class T, int N>
Shape backward_shape(const Problem& p, bool atomic) {
  const int threads =
      backward_lanes<N>(p) == 8 && atomic ? kBackwardThreads<T, 8, true> : kBackwardThreads<T, 0, false>;
  return shape_for(p, (p.channels + N - 1) / N, threads, 1,
                   [&](int lanes, int units) { return BackwardMemory<T, N>::bytes(p, lanes, units, atomic); });
}

// Calls f(grid, first image) for as many launches of the kernel as the images need.
template <class Kernel, class F>
cudaError_t for_each_launch(const Problem& p, const Shape& shape, Kernel kernel, const F& f) {
  if (shape.shared_bytes > kGrantedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  for (int64_t first = 0; first < p.batch && shape.tiles != 0; first += kGridLimit) {
    const auto images = static_cast<unsigned>(std::min(p.batch - first, kGridLimit));
    f(dim3(shape.tiles, static_cast<unsigned>(p.heads), images), static_cast<int32_t>(first));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, class C, int N>
cudaError_t forward_as(const Problem& p, void* output, cudaStream_t stream) {
  T* const target = static_cast<T*>(output);
  if constexpr (sizeof(T) == 2 && N == 8) {
    if (uses_tensor_cores(p)) {
      const Shape shape = tensor_core_shape<T>(p);
      const auto kernel = tensor_core_forward_kernel<T, C>;
      return for_each_launch(p, shape, kernel, [&](dim3 grid, int32_t first_image) {
        MSDA_LAUNCH(kernel, grid, shape.block, shape.shared_bytes, stream, p, first_image, shape.units_in_turn, target);
      });
    }
  }
  const Shape shape = forward_shape<T, N>(p);
  const auto kernel = forward_kernel<T, C, N>;
  return for_each_launch(p, shape, kernel, [&](dim3 grid, int32_t first_image) {
    MSDA_LAUNCH(kernel, grid, shape.block, shape.shared_bytes, stream, p, first_image, target);
  });
}

template <class T, class C, int N, bool kAtomic>
auto backward_kernel_for(const Problem& p) {
  if constexpr (N >= 4) {
    if (backward_lanes<N>(p) == 8) return backward_kernel<T, C, N, kAtomic, 8>;
    if (backward_lanes<N>(p) == 4) return backward_kernel<T, C, N, kAtomic, 4>;
  }
  return backward_kernel<T, C, N, kAtomic, 0>;
}

template <class T, class C, int N>
cudaError_t backward_as(const Problem& p, const Gradients& g, const Scratch& scratch, bool deterministic,
                        cudaStream_t stream) {
  using A = typename AccumulatorOf<T>::type;
  A* const grad_value = static_cast<A*>(scratch.value != nullptr ? scratch.value : g.value);
  A* const parts = static_cast<A*>(scratch.reference_points);
  auto* const samples = static_cast<ValueSample<A>*>(scratch.samples);
  const int64_t elements = p.batch * p.keys * p.heads * p.channels;
  if (elements != 0) {  // else the pointer is null
    // Atomics add to the zeros. Without them, only the gradients of pixels that no level has remain zero.
    const cudaError_t error =
        cudaMemsetAsync(grad_value, 0, elements * (deterministic ? sizeof(T) : sizeof(A)), stream);
    if (error != cudaSuccess) return error;
  }
  const Shape shape = backward_shape<T, N>(p, !deterministic);
  const auto kernel = deterministic ? backward_kernel_for<T, C, N, false>(p) : backward_kernel_for<T, C, N, true>(p);
  cudaError_t error = for_each_launch(p, shape, kernel, [&](dim3 grid, int32_t first_image) {
    MSDA_LAUNCH(kernel, grid, shape.block, shape.shared_bytes, stream, p, g, first_image, grad_value, parts, samples,
                scratch.sort);
  });
  if (error != cudaSuccess) return error;
  const int64_t count = p.batch * p.queries * p.levels * p.reference_size;
  if (count != 0) {
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
  return deterministic ? ordered_value_gradient<T, N>(p, g, samples, scratch.sort, stream) : cudaSuccess;
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
