// The operators' schemas, for a process without Python: with Python, msda_plugin/ops/library.py defines them.
#include <torch/csrc/stable/library.h>

// Called once, before a model that uses the operators is loaded. Throws if they are defined already.
extern "C" __attribute__((visibility("default"))) void msda_define_operators() {
  using torch::stable::detail::StableLibrary;
  // Lives as long as the process: the definitions end with it.
  static auto* library = new StableLibrary(StableLibrary::Kind::FRAGMENT, "msda", nullptr, __FILE__, __LINE__);
  library->def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights, bool deterministic, int[] num_points=[]) -> Tensor");
  library->def(
      "ms_deform_attn_fused(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits, bool deterministic, int[] num_points=[]) -> Tensor");
}
