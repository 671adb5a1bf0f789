"""Assembles a CUDA 12 and a CUDA 13 toolkit from the packages in requirements/wheel.txt, and prints them for ``NVCC``.

    NVCC=$(python csrc/toolkits.py DIR) python csrc/build.py --cuda on

PyPI has the assembler, headers and runtime of CUDA 12, but no nvcc. The CUDA 12 toolkit therefore runs nvcc 13.0 with
these parts: PTX of nvcc 13.0 differs from that of CUDA 12.9 by its version line, unless it uses newer instructions,
which the assembler of CUDA 12.9 rejects.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

NVCC = """#!/bin/sh
[ "$1" = --version ] && exec echo 'Cuda compilation tools, release 12.9 (front end of 13.0)'
# Drivers for CUDA 12 do not all read the default compression of nvcc 13.
exec "$(dirname "$0")/nvcc-13" --compress-mode=speed "$@"
"""
PTXAS = """#!/bin/sh
for argument; do
  case $argument in *.ptx) sed -i 's/^\\.version 9\\.0$/.version 8.8/' "$argument" ;; esac
done
exec "$(dirname "$0")/ptxas-12" "$@"
"""


def assemble(packages: Path, out: Path) -> list[Path]:
    """Assemble the toolkits of ``packages`` (the folder ``nvidia`` in site-packages) in ``out``. Returns each nvcc."""
    shutil.rmtree(out, ignore_errors=True)
    for major in ('12', '13'):
        shutil.copytree(packages / 'cu13', out / major)
        os.symlink('lib', out / major / 'lib64')
    cuda12 = out / '12'
    for name in ('cuda_runtime', 'cuda_cccl', 'cuda_nvcc'):
        shutil.copytree(packages / name, cuda12, dirs_exist_ok=True)
    # nvcc 13.0 generates launches in the form of its own header. They call the same functions of the runtime.
    shutil.copy2(packages / 'cu13/include/crt/host_runtime.h', cuda12 / 'include/crt/host_runtime.h')
    os.replace(cuda12 / 'bin/ptxas', cuda12 / 'bin/ptxas-12')
    os.replace(cuda12 / 'bin/nvcc', cuda12 / 'bin/nvcc-13')
    (cuda12 / 'bin/nvcc').write_text(NVCC)
    (cuda12 / 'bin/ptxas').write_text(PTXAS)
    for path in [*out.glob('*/bin/*'), *out.glob('*/nvvm/bin/*')]:
        path.chmod(0o755)
    return [out / '12/bin/nvcc', out / '13/bin/nvcc']


if __name__ == '__main__':
    found = assemble(Path(sysconfig.get_path('purelib')) / 'nvidia', Path(sys.argv[1]).resolve())
    print(os.pathsep.join(map(str, found)))
