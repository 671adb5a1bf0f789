// The CUDA binding as a CPU operator, for machines without a GPU: it is linked with the emulated kernels and with stubs
// for torch's CUDA functions.
#include <torch/csrc/stable/accelerator.h>

#include "../../csrc/binding.h"

#define MSDA_CUDA_ARCHITECTURES sm_90 + compute_90
#define CUDA CPU  // the dispatch key that the binding registers for
#include "../../csrc/cuda/binding.cpp"
#undef CUDA

#include <cstring>

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == 0 ? nullptr : strdup(("CUDA error " + std::to_string(error)).c_str());
  return AOTI_TORCH_SUCCESS;
}
static const void* elsewhere = nullptr;
// Lets the tensor with this data be on another device.
__attribute__((visibility("default"))) void emulate_elsewhere(const void* data) { elsewhere = data; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *index = data != nullptr && data == elsewhere ? 1 : 0;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
const char* msda_cpu_instruction_set() { return "CUDA, emulated"; }
}
