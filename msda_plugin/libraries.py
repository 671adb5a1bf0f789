"""Where the compiled libraries are. ``MSDA_LIBRARY_DIR`` names another directory of them."""

import os
from pathlib import Path

LIBRARY_DIR = Path(os.environ.get('MSDA_LIBRARY_DIR') or Path(__file__).parent / 'ops' / 'lib')


def onnxruntime_library() -> str:
    """Return the path of the library that computes the operator in onnxruntime, with the CPU kernels.

    It serves the nodes that :func:`msda_plugin.export.onnx_operator.operator_as` writes with ``'custom'`` and
    ``'tensorrt'``, in every onnxruntime >= 1.17. Inference needs neither torch nor msda_plugin, only this file.

    Raises:
        FileNotFoundError: If the library was not built.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(onnxruntime_library())
    """
    path = LIBRARY_DIR / 'libmsda_onnxruntime.so'
    if not path.exists():
        raise FileNotFoundError(
            f'{path} was not built: run "python csrc/build.py", or reinstall where a compiler is found'
        )
    return str(path)
