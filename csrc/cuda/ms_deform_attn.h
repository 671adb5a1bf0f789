// CUDA kernels of multi-scale deformable attention. Torch-free. Every call returns the launch's error.
//
// Sizes must be below these: queries 2^31, levels * points 2^31, bytes of a key's row (heads * channels) in the
// accumulation type 2^31; for a deterministic backward pass, queries * levels * points 2^30.
#pragma once

#include <cuda_runtime_api.h>

#include "../ms_deform_attn.h"

namespace msda::cuda {

// Memory that the backward pass works in, of the accumulation type unless said otherwise; null where it is not needed.
struct Scratch {
  void* value;             // the sums of the value's gradient, like value: unless deterministic or of that type already
  void* reference_points;  // fused: (batch, heads, queries, levels, reference_size)
  void* attention;         // fused and deterministic: like weights
  int32_t* sort;           // deterministic: sort_elements(problem) integers
};

int64_t sort_elements(const Problem& problem);

cudaError_t forward(const Problem& problem, void* output, cudaStream_t stream);

// Without `deterministic`, the gradient of the value is summed by atomics, in Scratch::value if that is given (the
// caller converts it), else in Gradients::value. The other gradients are bitwise repeatable always.
cudaError_t backward(const Problem& problem, const Gradients& gradients, const Scratch& scratch, bool deterministic,
                     cudaStream_t stream);

}  // namespace msda::cuda
