// CUDA kernels of multi-scale deformable attention, without torch. Every call returns the error of its launches.
//
// Limits: queries and levels * points must be below 2^31, heads below 2^16, and the bytes of a key's row (heads *
// channels) in the accumulation type below 2^31. For a deterministic backward pass, queries * levels * points must be
// below 2^30.
#pragma once

#include <cuda_runtime_api.h>

#include "../ms_deform_attn.h"

namespace msda::cuda {

// Scratch memory of the backward pass, of the accumulation type except for `sort`. Unused pointers are null.
struct Scratch {
  void* value;             // sums of the value's gradient, like value: if not deterministic and value has another type
  void* reference_points;  // fused: (batch, heads, queries, levels, reference_size)
  void* samples;           // deterministic: four numbers for each element of weights
  int32_t* sort;           // deterministic: sort_elements(problem) integers
};

int64_t sort_elements(const Problem& problem);

cudaError_t forward(const Problem& problem, void* output, cudaStream_t stream);

// Without `deterministic`, the gradient of the value is summed by atomics in Scratch::value, which the caller converts,
// or in Gradients::value if that is null. The other gradients are always bitwise repeatable.
cudaError_t backward(const Problem& problem, const Gradients& gradients, const Scratch& scratch, bool deterministic,
                     cudaStream_t stream);

}  // namespace msda::cuda
