// Registers the CPU kernels with torch's dispatcher through the stable ABI.
#include "../binding.h"

#include "ms_deform_attn.h"

namespace msda::cpu {
namespace {

Pool torch_pool() {
  return {
      static_cast<int>(torch::stable::get_num_threads()), [](int64_t count, int64_t grain, Body body, void* context) {
        torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
      }};
}

void check_levels(const Problem& p) {
  int64_t start = 0, packed = 2;  // rows of the packed levels, with their borders
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(
        height > 0 && width > 0 && height <= p.keys && width <= p.keys && p.level_start_index[level] == start,
        "spatial_shapes must be positive and level_start_index the running sum of the areas");
    start += height * width;
    packed += (height + 2) * (width + 1);
  }
  STD_TORCH_CHECK(packed < (int64_t{1} << 31), "the levels in spatial_shapes, with their borders, have ", packed,
                  " pixels, but fewer than 2^31 are needed");
  STD_TORCH_CHECK(start == p.keys, "the areas in spatial_shapes add up to ", start, ", but num_keys is ", p.keys);
}

}  // namespace

struct Backend {
  static void forward(const Arguments& a, Tensor& output) {
    check_levels(a.problem);
    cpu::forward(a.problem, output.mutable_data_ptr(), torch_pool());
  }

  static void backward(const Arguments& a, const GradientTensors& gradients, bool) {
    check_levels(a.problem);
    cpu::backward(a.problem, gradients.pointers(), torch_pool());
  }
};

}  // namespace msda::cpu

MSDA_REGISTER_OPERATORS(CPU, msda::cpu::Backend)

// Read by msda_plugin/ops/backends.py.
extern "C" __attribute__((visibility("default"))) const char* msda_cpu_instruction_set() {
  return msda::cpu::instruction_set();
}
