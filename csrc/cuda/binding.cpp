// Registers the CUDA kernels with torch's dispatcher through the stable ABI.
#include "../binding.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK: torch 2.11's accelerator.h does not include it

#include "ms_deform_attn.h"

namespace msda::cuda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_limits(const Problem& p, bool sorts) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(
      p.queries < kLimit && p.samples() < kLimit && p.heads < (1 << 16) && p.heads * p.channels < kLimit / 8,
      "the CUDA kernels need num_queries and num_levels * num_points below 2^31, num_heads below 2^16, and "
      "num_heads * head_dim below 2^28");
  STD_TORCH_CHECK(!sorts || p.queries * p.samples() < kLimit / 2,
                  "the deterministic backward pass needs num_queries * num_levels * num_points below 2^30: pass the "
                  "queries in parts");
}

}  // namespace

struct Backend {
  static void forward(const Arguments& a, Tensor& output) {
    check_limits(a.problem, false);
    const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
    STD_CUDA_CHECK(cuda::forward(a.problem, output.mutable_data_ptr(), current_stream(a.value)));
  }

  static void backward(const Arguments& a, const GradientTensors& gradients, bool deterministic) {
    using torch::stable::new_empty;
    const Problem& p = a.problem;
    check_limits(p, deterministic);
    const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
    const ScalarType sum_type = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
    const bool narrow = a.value.scalar_type() != sum_type, fused = p.reference_size != 0;

    Scratch scratch{};
    Tensor value = gradients.value, value_sum = value, parts = value, samples = value, sort = value;
    if (narrow && !deterministic) {
      value_sum = new_empty(value, value.sizes(), sum_type);
      scratch.value = value_sum.mutable_data_ptr();
    }
    if (fused) {
      parts = new_empty(value, {p.batch, p.heads, p.queries, p.levels, p.reference_size}, sum_type);
      scratch.reference_points = parts.mutable_data_ptr();
    }
    if (deterministic) {
      samples = new_empty(value, {4 * p.batch * p.queries * p.heads * p.samples()}, sum_type);
      scratch.samples = samples.mutable_data_ptr();
      sort = new_empty(value, {sort_elements(p)}, ScalarType::Int);
      scratch.sort = static_cast<int32_t*>(sort.mutable_data_ptr());
    }
    STD_CUDA_CHECK(cuda::backward(p, gradients.pointers(), scratch, deterministic, current_stream(a.value)));
    if (scratch.value != nullptr) torch::stable::copy_(value, value_sum);
  }
};

}  // namespace msda::cuda

MSDA_REGISTER_OPERATORS(CUDA, msda::cuda::Backend)

#define MSDA_STRING_(x) #x
#define MSDA_STRING(x) MSDA_STRING_(x)

// The GPU code in this library, such as "sm_80+sm_90+compute_90". Read by msda_plugin/ops/backends.py.
extern "C" __attribute__((visibility("default"))) const char* msda_cuda_architectures() {
  return MSDA_STRING(MSDA_CUDA_ARCHITECTURES);  // from csrc/build.py
}
