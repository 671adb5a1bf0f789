// Runs the CUDA kernels on the host, to test them without a GPU: the threads of a block are fibers on one thread, and
// every barrier or warp-wide operation switches between them, in random order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace emulator {

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  int lane;
  bool done;
  Barrier* warp;
  uint64_t* slots;  // of the warp
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
Fiber* current;
uint3 block_index;
dim3 block_size, grid_size;
Barrier block_barrier;
std::function<void()> body;
std::mt19937 order_generator;
unsigned order = 1;  // of each kernel, so that runs repeat
cudaError_t launch_error = cudaSuccess;
unsigned every_block = 1;  // 10: only every 10th block of a kernel runs

void yield() { swapcontext(&current->context, &scheduler); }

void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

void run_fiber() {
  body();
  current->done = true;
  yield();
}

void run_block() {
  const unsigned count = block_size.x * block_size.y;
  std::vector<Barrier> warps((count + 31) / 32);
  std::vector<uint64_t> slots(warps.size() * 32);
  block_barrier = {static_cast<int>(count), 0, 0};
  fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i % block_size.x, i / block_size.x, 0};
    fiber.lane = static_cast<int>(i % 32);
    fiber.done = false;
    fiber.warp = &warps[i / 32];
    ++fiber.warp->size;
    fiber.slots = &slots[i / 32 * 32];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(65536);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 65536;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[order_generator() % i]);
    for (const unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done) continue;
      busy = true;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
  }
}

constexpr size_t kSharedBytes = 1 << 18, kGuardBytes = 4096;
unsigned char* shared();  // memory of kSharedBytes

std::map<const void*, int> granted;  // bytes of shared memory that kernels have opted in to

// A block starts with shared memory full of NaNs (negative integers), and must not write past its end.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> call) {
  body = std::move(call);
  block_size = block;
  grid_size = grid;
  order_generator.seed(order);
  // Without opting in, no device grants more shared memory. A warp-wide operation needs whole warps.
  const size_t most = std::max(48 * 1024, granted[kernel]);
  if (shared_bytes > most || block.x * block.y > 1024 || block.x * block.y % 32 != 0) {
    launch_error = cudaErrorInvalidConfiguration;
    return;
  }
  unsigned char* const guard = shared() + shared_bytes;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; i += every_block) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    std::memset(shared(), 0xff, shared_bytes + kGuardBytes);
    run_block();
    for (size_t byte = 0; byte < kGuardBytes; ++byte)
      if (guard[byte] != 0xff) std::abort();
  }
}

template <class V>
V exchange(V value, int from) {
  std::memcpy(&current->slots[current->lane], &value, sizeof(V));
  wait(*current->warp);
  V result;
  std::memcpy(&result, &current->slots[from], sizeof(V));
  wait(*current->warp);
  return result;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
inline void __syncwarp() { emulator::wait(*emulator::current->warp); }
inline void __syncthreads() { emulator::wait(emulator::block_barrier); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return emulator::exchange(value, emulator::current->lane ^ mask);
}
template <class V>
V __shfl_sync(unsigned, V value, int lane) {
  return emulator::exchange(value, lane);
}
inline unsigned __match_any_sync(unsigned, int value) {
  unsigned result = 0;
  emulator::current->slots[emulator::current->lane] = static_cast<unsigned>(value);
  __syncwarp();
  for (int lane = 0; lane < emulator::current->warp->size; ++lane)
    result |= static_cast<unsigned>(emulator::current->slots[lane] == static_cast<unsigned>(value)) << lane;
  __syncwarp();
  return result;
}
template <class V>
V __shfl_up_sync(unsigned, V value, int step) {
  const int lane = emulator::current->lane;
  return emulator::exchange(value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const unsigned equal = __match_any_sync(0xffffffffu, value);
  return value ? equal : ~equal;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline float __fdividef(float x, float y) { return x / y; }
inline int __clz(unsigned x) { return __builtin_clz(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
static int64_t reductions = 0;               // of numbers in memory
static const char *zeros_begin, *zeros_end;  // what was cleared for them
inline int atomicAdd(int* target, int x) { return std::exchange(*target, *target + x); }
inline int atomicCAS(int* target, int expected, int x) {
  return std::exchange(*target, *target == expected ? x : *target);
}
template <class A>
void atomicAdd(A* target, A x) {
  ++reductions;
  const auto* const address = reinterpret_cast<const char*>(target);
  if (address < zeros_begin || address >= zeros_end) std::abort();
  *target += x;
}

static int launches_until_failure = -1;  // -1: never
static int capability = 9;

extern "C" {
__attribute__((visibility("default"))) void emulate_every_block(unsigned every) { emulator::every_block = every; }
__attribute__((visibility("default"))) void emulate_order(unsigned order) { emulator::order = order; }
__attribute__((visibility("default"))) int64_t emulate_reductions() { return std::exchange(reductions, 0); }
__attribute__((visibility("default"))) void emulate_failure(int launches) { launches_until_failure = launches; }
__attribute__((visibility("default"))) void emulate_capability(int major) { capability = major; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = capability;
  return attribute == cudaDevAttrComputeCapabilityMajor ? cudaSuccess : cudaErrorInvalidValue;
}
// As on a device, the error of a launch is returned once.
cudaError_t cudaGetLastError() {
  if (launches_until_failure >= 0 && launches_until_failure-- == 0) return cudaErrorInvalidConfiguration;
  return std::exchange(emulator::launch_error, cudaSuccess);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  // Compute capability 7.5 has the smallest maximum.
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 64 * 1024) return cudaErrorInvalidValue;
  emulator::granted[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int byte, size_t count, cudaStream_t) {
  if (target == nullptr) return cudaErrorInvalidValue;
  std::memset(target, byte, count);
  zeros_begin = static_cast<const char*>(target);
  zeros_end = zeros_begin + count;
  return cudaSuccess;
}
}

#undef __launch_bounds__
#define __launch_bounds__(...)
#define MSDA_EMULATED
#define MSDA_CHECK_ALIGNED(pointer, bytes) \
  if (reinterpret_cast<uintptr_t>(pointer) % (bytes) != 0) std::abort()
#define MSDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); })
#include "../../csrc/cuda/ms_deform_attn.cu"

namespace msda::cuda {
namespace {
alignas(16) unsigned char shared_memory[emulator::kSharedBytes];
}
}  // namespace msda::cuda
unsigned char* emulator::shared() { return msda::cuda::shared_memory; }

// sizes: batch, keys, heads, channels, levels, queries, points, reference_size, dtype, coordinate_dtype,
// wide_reference and, if points is 0, the points on each level; inputs: value, spatial_shapes, level_start_index,
// reference_points, coordinates, weights.
static msda::Problem problem_of(const int64_t* sizes, void* const* inputs) {
  msda::Problem p{sizes[0],
                  sizes[1],
                  sizes[2],
                  sizes[3],
                  sizes[4],
                  sizes[5],
                  sizes[6],
                  static_cast<int>(sizes[7]),
                  static_cast<msda::DType>(sizes[8]),
                  static_cast<msda::DType>(sizes[9]),
                  sizes[10] != 0,
                  inputs[0],
                  static_cast<const int64_t*>(inputs[1]),
                  static_cast<const int64_t*>(inputs[2]),
                  inputs[3],
                  inputs[4],
                  inputs[5]};
  for (int64_t level = 0; level < p.levels && p.points == 0; ++level)
    p.level_begin[level + 1] = static_cast<int32_t>(p.level_begin[level] + sizes[11 + level]);
  return p;
}

extern "C" __attribute__((visibility("default"))) int64_t emulate_sort_elements(const int64_t* sizes) {
  void* const inputs[6] = {};
  return msda::cuda::sort_elements(problem_of(sizes, inputs));
}

// Writes lanes, units and bytes of shared memory of a block: forward, backward, then forward on tensor cores (or
// again).
extern "C" __attribute__((visibility("default"))) int emulate_blocks(const int64_t* sizes, int aligned, int64_t* out) {
  void* const inputs[6] = {};
  const msda::Problem p = problem_of(sizes, inputs);
  return msda::cuda::dispatch(p, aligned ? 0 : 1, [&](auto t, auto, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const auto plain = msda::cuda::forward_shape<decltype(t), kWidth>(p);
    const bool other = sizeof(t) == 2 && kWidth == 8 && msda::cuda::uses_tensor_cores(p);
    for (const auto& shape : {plain, msda::cuda::backward_shape<decltype(t), kWidth>(p, true),
                              other ? msda::cuda::tensor_core_shape<decltype(t)>(p) : plain}) {
      *out++ = shape.block.x;
      *out++ = shape.block.y;
      *out++ = static_cast<int64_t>(shape.shared_bytes);
    }
    return cudaSuccess;
  });
}

extern "C" __attribute__((visibility("default"))) int emulate_forward(const int64_t* sizes, void* const* inputs,
                                                                      void* output) {
  return msda::cuda::forward(problem_of(sizes, inputs), output, nullptr);
}

// gradients: output, value, reference_points, coordinates, weights; scratch: value, reference_points, samples, sort.
extern "C" __attribute__((visibility("default"))) int emulate_backward(const int64_t* sizes, void* const* inputs,
                                                                       void* const* gradients, void* const* scratch,
                                                                       int deterministic) {
  return msda::cuda::backward(
      problem_of(sizes, inputs), {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]},
      {scratch[0], scratch[1], scratch[2], static_cast<int32_t*>(scratch[3])}, deterministic != 0, nullptr);
}
