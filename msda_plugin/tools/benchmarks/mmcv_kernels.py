"""Compiles mmcv's CUDA kernel of multi-scale deformable attention from its source distribution, for comparison.

This file contains no code of mmcv. The binding below includes the kernel from the distribution, is compiled on the
machine that runs the benchmark, and launches the kernel as mmcv does: with the same block sizes, after zeroing the same
memory.
"""

import ctypes
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from msda_plugin.tools.common.nvcc import find_nvcc

KERNEL = Path('mmcv/ops/csrc/common/cuda/ms_deform_attn_cuda_kernel.cuh')
HEAD_DIMS = (16, 32, 64)  # for which the backward kernels are instantiated
DTYPES = (torch.float64, torch.float32, torch.float16)

# Replaces mmcv's helper of this name, which the kernel's header includes and which needs all of ATen.
HELPER = '#include <algorithm>\nusing std::min;\n'
BINDING = r"""
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

__device__ inline void atomicAdd(c10::Half* target, c10::Half x) {
  atomicAdd(reinterpret_cast<__half*>(target), static_cast<__half>(x));
}

#include "ms_deform_attn_cuda_kernel.cuh"

// sizes: batch, keys, heads, channels, levels, queries, points; tensors: value, shapes, starts, locations, weights
template <class T>
int forward(cudaStream_t stream, const int* sizes, void* const* tensors, void* output) {
  const int count = sizes[0] * sizes[5] * sizes[2] * sizes[3];
  ms_deformable_im2col_gpu_kernel<T><<<GET_BLOCKS(count, THREADS_PER_BLOCK), THREADS_PER_BLOCK, 0, stream>>>(
      count, static_cast<const T*>(tensors[0]), static_cast<const int64_t*>(tensors[1]),
      static_cast<const int64_t*>(tensors[2]), static_cast<const T*>(tensors[3]), static_cast<const T*>(tensors[4]),
      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], static_cast<T*>(output));
  return cudaGetLastError();
}

template <class T>
int backward(cudaStream_t stream, const int* sizes, void* const* tensors, const void* grad, void* const* grads) {
  const auto launch = [&](auto kernel) {
    const int count = sizes[0] * sizes[5] * sizes[2] * sizes[3], threads = sizes[3];
    kernel<<<GET_BLOCKS(count, threads), threads, 0, stream>>>(
        count, static_cast<const T*>(grad), static_cast<const T*>(tensors[0]), static_cast<const int64_t*>(tensors[1]),
        static_cast<const int64_t*>(tensors[2]), static_cast<const T*>(tensors[3]), static_cast<const T*>(tensors[4]),
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], static_cast<T*>(grads[0]),
        static_cast<T*>(grads[1]), static_cast<T*>(grads[2]));
    return static_cast<int>(cudaGetLastError());
  };
  switch (sizes[3]) {
    case 16: return launch(ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v1<T, 16>);
    case 32: return launch(ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v1<T, 32>);
    case 64: return launch(ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v2<T, 64>);
  }
  return cudaErrorInvalidValue;
}

extern "C" int mmcv_forward(int dtype, void* stream, const int* sizes, void* const* tensors, void* output) {
  const auto f = dtype == 0 ? forward<double> : dtype == 1 ? forward<float> : forward<c10::Half>;
  return f(static_cast<cudaStream_t>(stream), sizes, tensors, output);
}
extern "C" int mmcv_backward(int dtype, void* stream, const int* sizes, void* const* tensors, const void* grad,
                             void* const* grads) {
  const auto f = dtype == 0 ? backward<double> : dtype == 1 ? backward<float> : backward<c10::Half>;
  return f(static_cast<cudaStream_t>(stream), sizes, tensors, grad, grads);
}
"""


@contextmanager
def unpacked(sdist: Path) -> Iterator[Path]:
    """Context manager for the folder of mmcv's sources: ``sdist`` itself, or the unpacked archive.

    Raises:
        FileNotFoundError: If ``sdist`` does not exist or does not contain the kernel.
    """
    if not sdist.exists():
        raise FileNotFoundError(f'{sdist} does not exist: run pip download --no-binary :all: --no-deps onedl-mmcv')
    with tempfile.TemporaryDirectory() as work:
        root = sdist
        if sdist.is_file():
            root = Path(work)
            with tarfile.open(sdist) as archive:
                archive.extractall(root, filter='data')
        found = [
            kernel.parents[len(KERNEL.parts) - 1]
            for kernel in sorted(root.rglob(KERNEL.name))
            if kernel.parts[-len(KERNEL.parts) :] == KERNEL.parts
        ]
        if not found:
            raise FileNotFoundError(f"{sdist} has no {KERNEL}: it is not mmcv's source distribution")
        yield found[0]


def build(sdist: Path, arch: str, target: Path) -> None:
    """Compile mmcv's kernel and the binding into the shared library ``target``.

    Args:
        sdist: mmcv's source distribution, an archive or a folder.
        arch: The GPU's architecture, such as ``'sm_90'``.

    Raises:
        FileNotFoundError: If there is no nvcc, or no kernel in ``sdist``.
        RuntimeError: If the compilation fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("mmcv's kernel cannot be compiled: no nvcc was found. Put it on PATH or set NVCC.")
    with unpacked(sdist) as root, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / 'pytorch_cuda_helper.hpp').write_text(HELPER)
        (work / 'binding.cu').write_text(BINDING)
        places = (work, root / KERNEL.parent, Path(torch.__file__).parent / 'include')
        done = subprocess.run(
            [
                nvcc,
                '-O3',
                '-std=c++20',
                '-w',
                f'-arch={arch}',
                '-shared',
                '-Xcompiler=-fPIC',
                *(f'-I{place}' for place in places),
                str(work / 'binding.cu'),
                '-o',
                str(target),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"mmcv's kernel does not compile:\n{done.stdout}{done.stderr}")


class MmcvKernels:
    """mmcv's kernel as a function of (value, spatial_shapes, level_start_index, locations, weights), with gradients.

    All float tensors have the same dtype, one of `DTYPES`. The backward pass supports the head dims in `HEAD_DIMS`.

    Args:
        library: The library compiled by `build`.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, *tensors: Tensor) -> Tensor:
        return _Function.apply(self, *tensors)

    def run(self, name: str, tensors: tuple[Tensor, ...], *rest: object) -> None:
        value, locations = tensors[0], tensors[3]
        sizes = (ctypes.c_int * 7)(*value.shape, locations.shape[3], locations.shape[1], locations.shape[4])
        stream = ctypes.c_void_p(torch.cuda.current_stream(value.device).cuda_stream)
        error = getattr(self.library, name)(DTYPES.index(value.dtype), stream, sizes, _pointers(tensors), *rest)
        if error:
            raise RuntimeError(f"mmcv's kernel: {name} returned CUDA error {error}")


def _pointers(tensors: tuple[Tensor, ...]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: MmcvKernels, *tensors: Tensor) -> Tensor:
        value, locations = tensors[0], tensors[3]
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors)
        output = value.new_zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
        kernels.run('mmcv_forward', tensors, ctypes.c_void_p(output.data_ptr()))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensors[i]) for i in (0, 3, 4))
        grad = grad.contiguous()
        ctx.kernels.run('mmcv_backward', tensors, ctypes.c_void_p(grad.data_ptr()), _pointers(grads))
        return None, grads[0], None, None, *grads[1:]
