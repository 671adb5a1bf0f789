// Converts tensors to the kernels' arguments and registers the operators, for every backend. The checks here keep
// memory safe for callers of torch.ops.msda; msda_plugin/ops/checks.py has the checks with helpful messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "ms_deform_attn.h"

namespace msda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, name, " must have dtype float64, float32, float16 or bfloat16");
  }
  return DType::float32;
}

// Contiguous inputs and the problem that points into them.
struct Arguments {
  Tensor value, spatial_shapes, level_start_index, reference_points, coordinates, weights;
  Problem problem;
};

inline void check_sizes(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(equal, name, " has sizes that do not fit the other arguments");
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& value) {
  STD_TORCH_CHECK(tensor.is_cpu() == value.is_cpu() && tensor.get_device_index() == value.get_device_index(), name,
                  " must be on the device of value");
}

using Points = std::vector<int64_t>;  // the number of points on each level; may be empty if all are equal

// `reference_points` is null for the plain operator.
inline Arguments make_arguments(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
                                const Tensor* reference_points, const Tensor& coordinates, const Tensor& weights,
                                const Points& num_points) {
  check_device(spatial_shapes, "spatial_shapes", value);
  check_device(level_start_index, "level_start_index", value);
  check_device(coordinates, "coordinates", value);
  check_device(weights, "weights", value);
  STD_TORCH_CHECK(value.dim() == 4, "value must be (bs, num_keys, num_heads, head_dim)");
  const bool even = coordinates.dim() == 6;
  STD_TORCH_CHECK(even || (coordinates.dim() == 5 && !num_points.empty()),
                  "coordinates must be (bs, num_queries, num_heads, num_levels, num_points, 2), or with num_points "
                  "(bs, num_queries, num_heads, points of all levels, 2)");
  STD_TORCH_CHECK(
      spatial_shapes.scalar_type() == ScalarType::Long && level_start_index.scalar_type() == ScalarType::Long,
      "spatial_shapes and level_start_index must have dtype int64");
  Problem p{};
  p.batch = value.size(0);
  p.keys = value.size(1);
  p.heads = value.size(2);
  p.channels = value.size(3);
  p.queries = coordinates.size(1);
  p.levels = even ? coordinates.size(3) : static_cast<int64_t>(num_points.size());
  p.points = even ? coordinates.size(4) : num_points[0];
  for (const int64_t points : num_points) {
    STD_TORCH_CHECK(points > 0 && points < (int64_t{1} << 26), "num_points must be 1 to 2^26 on each level");
    if (points != num_points[0]) p.points = 0;
  }
  STD_TORCH_CHECK(!even || num_points.empty() || num_points == Points(p.levels, coordinates.size(4)),
                  "num_points must be the number of points in coordinates, for each level");
  if (p.points == 0 && !even) {
    STD_TORCH_CHECK(p.levels <= kMaxUnevenLevels, "num_points must have at most ", kMaxUnevenLevels, " levels");
    for (int64_t level = 0; level < p.levels; ++level)
      p.level_begin[level + 1] = static_cast<int32_t>(p.level_begin[level] + num_points[level]);
  }
  STD_TORCH_CHECK(p.heads > 0 && p.channels > 0 && p.levels > 0 && (!even || p.points > 0),
                  "num_heads, head_dim, num_levels and num_points must be at least 1");
  STD_TORCH_CHECK(p.keys < (int64_t{1} << 31) - 1, "num_keys must be below 2^31 - 1");
  check_sizes(spatial_shapes, "spatial_shapes", {p.levels, 2});
  check_sizes(level_start_index, "level_start_index", {p.levels});
  std::vector<int64_t> sizes{p.batch, p.queries, p.heads, p.samples()};
  if (even) sizes = {p.batch, p.queries, p.heads, p.levels, p.points};
  check_sizes(weights, "weights", sizes);
  sizes.push_back(2);
  check_sizes(coordinates, "coordinates", sizes);

  p.dtype = dtype_of(value, "value");
  p.coordinate_dtype = dtype_of(coordinates, "coordinates");
  const DType accumulation = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  STD_TORCH_CHECK((p.coordinate_dtype == p.dtype || p.coordinate_dtype == accumulation) &&
                      dtype_of(weights, "weights") == p.coordinate_dtype,
                  "coordinates and weights must both have value's dtype or float32 (float64 for a float64 value)");

  using torch::stable::contiguous;
  Arguments a{contiguous(value),
              contiguous(spatial_shapes),
              contiguous(level_start_index),
              value,
              contiguous(coordinates),
              contiguous(weights),
              p};
  if (reference_points != nullptr) {
    check_device(*reference_points, "reference_points", value);
    a.problem.reference_size = static_cast<int>(reference_points->size(-1));
    check_sizes(*reference_points, "reference_points", {p.batch, p.queries, p.levels, a.problem.reference_size});
    STD_TORCH_CHECK(a.problem.reference_size == 2 || a.problem.reference_size == 4,
                    "reference_points must have 2 or 4 coordinates");
    const DType dtype = dtype_of(*reference_points, "reference_points");
    STD_TORCH_CHECK(dtype == p.coordinate_dtype || dtype == accumulation,
                    "reference_points must have the dtype of the offsets or float32 (float64 for a float64 value)");
    a.problem.wide_reference = dtype != p.coordinate_dtype;
    a.reference_points = contiguous(*reference_points);
    a.problem.reference_points = a.reference_points.const_data_ptr();
  }
  a.problem.value = a.value.const_data_ptr();
  a.problem.spatial_shapes = static_cast<const int64_t*>(a.spatial_shapes.const_data_ptr());
  a.problem.level_start_index = static_cast<const int64_t*>(a.level_start_index.const_data_ptr());
  a.problem.coordinates = a.coordinates.const_data_ptr();
  a.problem.weights = a.weights.const_data_ptr();
  return a;
}

// The gradients of one backward pass, uninitialized, and the gradient of the output, contiguous.
struct GradientTensors {
  Tensor output, value, reference_points, coordinates, weights;

  GradientTensors(const Arguments& a, const Tensor& grad_output)
      : output(torch::stable::contiguous(grad_output)), value(torch::stable::empty_like(a.value)),
        reference_points(a.problem.reference_size != 0 ? torch::stable::empty_like(a.reference_points) : value),
        coordinates(torch::stable::empty_like(a.coordinates)), weights(torch::stable::empty_like(a.weights)) {
    const Problem& p = a.problem;
    check_device(grad_output, "grad_output", a.value);
    check_sizes(grad_output, "grad_output", {p.batch, p.queries, p.heads * p.channels});
    STD_TORCH_CHECK(grad_output.scalar_type() == a.value.scalar_type(), "grad_output must have value's dtype");
  }

  Gradients pointers() const {
    return {output.const_data_ptr(), value.mutable_data_ptr(), reference_points.mutable_data_ptr(),
            coordinates.mutable_data_ptr(), weights.mutable_data_ptr()};
  }
};

// The operators of a backend, as torch.ops.msda declares them. Backend has two static functions, which check the
// problem and run it:
//   void forward(const Arguments&, Tensor& output)
//   void backward(const Arguments&, const GradientTensors&, bool deterministic)
template <class Backend>
struct Operators {
  static Tensor ms_deform_attn(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
                               const Tensor& sampling_locations, const Tensor& attention_weights, bool,
                               const Points& num_points) {
    return forward(make_arguments(value, spatial_shapes, level_start_index, nullptr, sampling_locations,
                                  attention_weights, num_points));
  }

  static Tensor ms_deform_attn_fused(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
                                     const Tensor& reference_points, const Tensor& sampling_offsets,
                                     const Tensor& attention_logits, bool, const Points& num_points) {
    return forward(make_arguments(value, spatial_shapes, level_start_index, &reference_points, sampling_offsets,
                                  attention_logits, num_points));
  }

  static std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
      const Tensor& sampling_locations, const Tensor& attention_weights, bool deterministic, const Points& num_points) {
    const GradientTensors g = backward(make_arguments(value, spatial_shapes, level_start_index, nullptr,
                                                      sampling_locations, attention_weights, num_points),
                                       grad_output, deterministic);
    return {g.value, g.coordinates, g.weights};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
      const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
      bool deterministic, const Points& num_points) {
    const GradientTensors g = backward(make_arguments(value, spatial_shapes, level_start_index, &reference_points,
                                                      sampling_offsets, attention_logits, num_points),
                                       grad_output, deterministic);
    return {g.value, g.reference_points, g.coordinates, g.weights};
  }

 private:
  static Tensor forward(const Arguments& a) {
    const Problem& p = a.problem;
    Tensor output = torch::stable::new_empty(a.value, {p.batch, p.queries, p.heads * p.channels});
    Backend::forward(a, output);
    return output;
  }

  static GradientTensors backward(const Arguments& a, const Tensor& grad_output, bool deterministic) {
    GradientTensors gradients(a, grad_output);
    Backend::backward(a, gradients, deterministic);
    return gradients;
  }
};

}  // namespace msda

// Registers the operators of a backend for a dispatch key, such as CPU.
#define MSDA_REGISTER_OPERATORS(dispatch_key, Backend)                                             \
  STABLE_TORCH_LIBRARY_IMPL(msda, dispatch_key, m) {                                               \
    using Operators = msda::Operators<Backend>;                                                    \
    m.impl("ms_deform_attn", TORCH_BOX(&Operators::ms_deform_attn));                               \
    m.impl("ms_deform_attn_backward", TORCH_BOX(&Operators::ms_deform_attn_backward));             \
    m.impl("ms_deform_attn_fused", TORCH_BOX(&Operators::ms_deform_attn_fused));                   \
    m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&Operators::ms_deform_attn_fused_backward)); \
  }
