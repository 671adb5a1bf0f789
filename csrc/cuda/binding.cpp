// Registers the CUDA kernels with torch's dispatcher, by way of the stable ABI.
#include <cuda_runtime_api.h>

#include "../binding.h"
#include "ms_deform_attn.h"

#include <torch/csrc/stable/accelerator.h>

namespace msda::cuda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_limits(const Problem& p, bool sorts) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(p.queries < kLimit && p.samples() < kLimit && p.heads * p.channels < kLimit / 8,
                  "the CUDA kernels need num_queries and num_levels * num_points below 2^31, num_heads * head_dim "
                  "below 2^28");
  STD_TORCH_CHECK(!sorts || p.queries * p.samples() < kLimit / 2,
                  "the deterministic backward pass needs num_queries * num_levels * num_points below 2^30: pass the "
                  "queries in parts");
}

Tensor run_forward(const Arguments& a) {
  check_limits(a.problem, false);
  const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
  Tensor output = make_output(a);
  STD_CUDA_CHECK(cuda::forward(a.problem, output.mutable_data_ptr(), current_stream(a.value)));
  return output;
}

Tensor ms_deform_attn(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
                      const Tensor& sampling_locations, const Tensor& attention_weights, bool) {
  return run_forward(make_arguments(value, spatial_shapes, level_start_index, nullptr, sampling_locations,
                                    attention_weights));
}

Tensor ms_deform_attn_fused(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
                            const Tensor& reference_points, const Tensor& sampling_offsets,
                            const Tensor& attention_logits, bool) {
  return run_forward(make_arguments(value, spatial_shapes, level_start_index, &reference_points, sampling_offsets,
                                    attention_logits));
}

// The gradients of the value, the reference points (meaningless for the plain operator), the coordinates and the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Arguments& a, const Tensor& grad_output,
                                                        bool deterministic) {
  using torch::stable::empty_like;
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
  const Problem& p = a.problem;
  check_limits(p, deterministic);
  const ScalarType sum_type = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  const bool narrow = a.value.scalar_type() != sum_type, fused = p.reference_size != 0;

  const Tensor output = make_grad_output(a, grad_output);
  Tensor value = empty_like(a.value), coordinates = empty_like(a.coordinates), weights = empty_like(a.weights);
  Tensor reference_points = fused ? empty_like(a.reference_points) : weights;

  Scratch scratch{};
  Tensor value_sum = value, parts = value, attention = value, sort = value;
  if (narrow && !deterministic) {
    value_sum = new_empty(a.value, a.value.sizes(), sum_type);
    scratch.value = value_sum.mutable_data_ptr();
  }
  if (fused) {
    parts = new_empty(a.value, {p.batch, p.heads, p.queries, p.levels, p.reference_size}, sum_type);
    scratch.reference_points = parts.mutable_data_ptr();
  }
  if (fused && deterministic) {
    attention = new_empty(a.value, a.weights.sizes(), sum_type);
    scratch.attention = attention.mutable_data_ptr();
  }
  if (deterministic) {
    sort = new_empty(a.value, {sort_elements(p)}, ScalarType::Int);
    scratch.sort = static_cast<int32_t*>(sort.mutable_data_ptr());
  }
  STD_CUDA_CHECK(cuda::backward(p,
                                {output.const_data_ptr(), value.mutable_data_ptr(), reference_points.mutable_data_ptr(),
                                 coordinates.mutable_data_ptr(), weights.mutable_data_ptr()},
                                scratch, deterministic, current_stream(a.value)));
  if (scratch.value != nullptr) torch::stable::copy_(value, value_sum);
  return {value, reference_points, coordinates, weights};
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const Tensor& spatial_shapes, const Tensor& level_start_index,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, bool deterministic) {
  const auto [grad_value, unused, grad_locations, grad_weights] =
      run_backward(make_arguments(value, spatial_shapes, level_start_index, nullptr, sampling_locations,
                                  attention_weights),
                   grad_output, deterministic);
  return {grad_value, grad_locations, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits, bool deterministic) {
  return run_backward(make_arguments(value, spatial_shapes, level_start_index, &reference_points, sampling_offsets,
                                     attention_logits),
                      grad_output, deterministic);
}

}  // namespace
}  // namespace msda::cuda

STABLE_TORCH_LIBRARY_IMPL(msda, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&msda::cuda::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&msda::cuda::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&msda::cuda::ms_deform_attn_fused));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&msda::cuda::ms_deform_attn_fused_backward));
}
