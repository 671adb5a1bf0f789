// The forward kernel on tensor cores (compute capability 8.0), for 16-bit values with 16 to 64 channels.
//
// A warp multiplies corner values (16 x 16: channels x corners of four samples) by weights (16 x 8: corners x columns).
// Of the instruction's operands, lane 4 * g + t holds rows g and g + 8 of the values and column g of the weights, both
// for the same four corners: those of sample t. So each lane loads 16 bytes, 8 channels, of each corner of a sample,
// and four instructions take 2 of the channels each. The lanes of all g together have 64 channels: of one unit, or of 2
// or 4 units with fewer channels. The values of a unit meet the weights of all these units; only the products with its
// own are kept.
//
// Each unit has two columns, because its weights have two parts: rounded to 16 bits, and what that leaves.
#pragma once

#include "forward.cuh"
#include "mma.cuh"

namespace msda::cuda {
namespace {

constexpr int kUnitsInTurn = 4;  // at most, that a group of lanes computes one after another
constexpr int kStep = 4;         // samples of a unit that an instruction takes

// The factor of what a weight loses by rounding: with it, float16 has digits down to 2^-36.
template <class T>
constexpr float kRestScale = std::is_same_v<T, __half> ? 2048.0f : 1.0f;

template <class T>
struct MatrixSample {
  Pack<int32_t, 4> key;  // negative: there is no sample
  Pack<T, 4> weight[2];  // rounded; the rest, scaled
};

template <class T>
__device__ __forceinline__ MatrixSample<T> split(const PlannedSample<float>& sample) {
  MatrixSample<T> result;
  result.key = sample.key;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const float weight = sample.weight.x[corner];
    const T rounded = narrow<T>(weight);
    result.weight[0].x[corner] = rounded;
    result.weight[1].x[corner] = narrow<T>((weight - widen<float>(rounded)) * kRestScale<T>);
  }
  return result;
}

// 16 bytes, or zeros if the key is negative. By itself, the compiler would branch instead of predicating the load.
__device__ __forceinline__ Pack<uint32_t, 4> load_if_exists(int32_t key, const void* source) {
  Pack<uint32_t, 4> x = {};
#ifdef __CUDA_ARCH__
  asm("{\n .reg .pred exists;\n setp.ge.s32 exists, %5, 0;\n @exists ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(x.x[0]), "+r"(x.x[1]), "+r"(x.x[2]), "+r"(x.x[3])
      : "l"(source), "r"(key));
#else
  if (key < 0) return x;
  MSDA_CHECK_ALIGNED(source, sizeof(x));
  x = *static_cast<const Pack<uint32_t, 4>*>(source);
#endif
  return x;
}

// The lower or upper halves of two words.
__device__ __forceinline__ uint32_t lower_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

// Samples of a unit in shared memory, and a gap so that units begin in different banks.
MSDA_INLINE int matrix_plan_size(const Problem& p) {
  return (static_cast<int>(p.samples()) + kStep - 1) / kStep * kStep + 1;
}

template <class T, class C>
__global__ void __launch_bounds__(kForwardThreads<T>, kForwardBlocks<T>)
    tensor_core_forward_kernel(const Problem p, int32_t first_image, int units_in_turn, T* __restrict__ output) {
  const int lanes = blockDim.x, lane = (threadIdx.y * lanes + threadIdx.x) & 31, g = lane / 4, t = lane % 4;
  const int units = lanes == 32 ? 1 : lanes == 16 ? 2 : 4;  // that a warp computes together
  const int own = threadIdx.y & (units - 1);                // which of them is the lane's
  const int channels = static_cast<int>(p.channels), all = static_cast<int>(p.samples());
  const int c = threadIdx.x / 4 * 8;
  const int size = matrix_plan_size(p), total = size - 1;
  auto* const samples = reinterpret_cast<MatrixSample<T>*>(shared_memory) + threadIdx.y * size;
  const auto* const keys = samples + t;
  // Columns 2 * u and 2 * u + 1 belong to unit u of the warp.
  const auto* const weights = &samples[((g / 2 & (units - 1)) - own) * size + t].weight[g % 2];
  const int32_t row_bytes = static_cast<int32_t>(p.heads * p.channels * sizeof(T));

  const unsigned first_position = (blockIdx.x * blockDim.y + threadIdx.y) * units_in_turn;
  const Unit of_lane(p, first_image, first_position + threadIdx.x % kUnitsInTurn);
  // A lane without channels loads others, but does not store them.
  int64_t begin = of_lane.base(p) + (c < channels ? c : 0);
  compute_now(begin);
  const T* const rows = static_cast<const T*>(p.value) + begin;
#pragma unroll 1
  for (int turn = 0; turn < units_in_turn; ++turn) {
    const Unit unit(first_image, __shfl_sync(kAllLanes, of_lane.query, own * lanes + turn),
                    first_position + turn < p.queries);
    const Attention<float, C> attention(p, unit, lanes);
    __syncwarp();
    plan(p, unit, attention, 0, all, [&](int i, bool exists, const PlannedSample<float>& sample) {
      if (i < all) samples[i] = exists ? split<T>(sample) : MatrixSample<T>{{-1}};
    });
    if (static_cast<int>(threadIdx.x) < total - all) samples[all + threadIdx.x] = {{-1}};
    __syncwarp();
    float sum[4][4] = {};
#pragma unroll 1
    for (int i = 0; i < total; i += kStep) {
      const Pack<int32_t, 4> key = keys[i].key;
      const auto weight = *reinterpret_cast<const Pack<uint32_t, 2>*>(weights + 4 * i);
      Pack<uint32_t, 4> x[4];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        x[corner] = load_if_exists(key.x[0], row_at(rows, key.x[corner], row_bytes));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t values[4] = {lower_halves(x[0].x[j], x[1].x[j]), upper_halves(x[0].x[j], x[1].x[j]),
                                    lower_halves(x[2].x[j], x[3].x[j]), upper_halves(x[2].x[j], x[3].x[j])};
        multiply_add<T>(sum[j], values, weight.x);
      }
    }
    if (c >= channels || !unit.valid || t != own) continue;  // the lane's columns are those of unit t
    float result[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) result[j] = sum[j / 2][j % 2 * 2] + sum[j / 2][j % 2 * 2 + 1] / kRestScale<T>;
    store(output + unit.index(p) * channels + c, result);
  }
}

}  // namespace
}  // namespace msda::cuda
