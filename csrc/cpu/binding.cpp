// Registers the CPU kernels with torch's dispatcher, by way of the stable ABI.
#include "../binding.h"
#include "ms_deform_attn.h"

namespace msda::cpu {
namespace {

Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int64_t count, int64_t grain, Body body, void* context) {
            torch::stable::parallel_for(0, count, grain,
                                        [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

void check_levels(const Problem& p) {
  int64_t start = 0, packed = 2;  // rows of the packed levels, with their borders
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= p.keys && width <= p.keys && p.level_start_index[level] == start,
                    "spatial_shapes must be positive and level_start_index the running sum of the areas");
    start += height * width;
    packed += (height + 2) * (width + 1);
  }
  STD_TORCH_CHECK(packed < (int64_t{1} << 31), "the levels in spatial_shapes, with their borders, have ", packed,
                  " pixels, but fewer than 2^31 are needed");
  STD_TORCH_CHECK(start == p.keys, "the areas in spatial_shapes add up to ", start, ", but num_keys is ", p.keys);
}

Tensor run_forward(const Arguments& a) {
  check_levels(a.problem);
  Tensor output = make_output(a);
  cpu::forward(a.problem, output.mutable_data_ptr(), torch_pool());
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

// The gradients of the value, the reference points (like `reference_points`), the coordinates and the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Arguments& a, const Tensor& grad_output) {
  check_levels(a.problem);
  const Tensor output = make_grad_output(a, grad_output);
  Tensor value = torch::stable::empty_like(a.value), coordinates = torch::stable::empty_like(a.coordinates);
  Tensor weights = torch::stable::empty_like(a.weights);
  Tensor reference_points = a.problem.reference_size ? torch::stable::empty_like(a.reference_points) : weights;
  cpu::backward(a.problem,
                {output.const_data_ptr(), value.mutable_data_ptr(), reference_points.mutable_data_ptr(),
                 coordinates.mutable_data_ptr(), weights.mutable_data_ptr()},
                torch_pool());
  return {value, reference_points, coordinates, weights};
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const Tensor& spatial_shapes, const Tensor& level_start_index,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, bool) {
  const auto [grad_value, unused, grad_locations, grad_weights] =
      run_backward(make_arguments(value, spatial_shapes, level_start_index, nullptr, sampling_locations,
                                  attention_weights),
                   grad_output);
  return {grad_value, grad_locations, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits, bool) {
  return run_backward(make_arguments(value, spatial_shapes, level_start_index, &reference_points, sampling_offsets,
                                     attention_logits),
                      grad_output);
}

}  // namespace
}  // namespace msda::cpu

STABLE_TORCH_LIBRARY_IMPL(msda, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&msda::cpu::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&msda::cpu::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&msda::cpu::ms_deform_attn_fused));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&msda::cpu::ms_deform_attn_fused_backward));
}

// For tools that say what runs.
extern "C" __attribute__((visibility("default"))) const char* msda_cpu_instruction_set() {
  return msda::cpu::instruction_set();
}
