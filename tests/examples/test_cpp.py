"""examples/cpp: built, and run on an exported model, in a process without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / 'msda_plugin' / 'ops' / 'lib' / 'libmsda_cpu.so'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which('cmake') is None or shutil.which('g++') is None, reason='cmake and g++ are needed'),
    pytest.mark.skipif(backend_for('cpu', torch.float32).name != 'cpu', reason='libmsda_cpu is not built'),
]


class Detector(nn.Module):
    """An image (1, h, w, 3) uint8 -> boxes, scores, labels, by the plain and the fused operator."""

    levels = ((6, 8), (3, 4))

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.points = nn.Parameter(torch.rand(1, 7, 2, 2))
        self.queries = nn.Parameter(torch.randn(1, 7, 16))
        self.offsets, self.logits = nn.Linear(16, 2 * 2 * 4 * 2), nn.Linear(16, 2 * 2 * 4)
        self.boxes, self.scores = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, images):
        maps = self.patches(images.permute(0, 3, 1, 2).float() / 255)
        keys = torch.cat([maps.flatten(2), maps[..., ::2, ::2].flatten(2)], 2).transpose(1, 2)
        value = keys.reshape(1, 60, 2, 8)
        offsets = self.offsets(self.queries).view(1, 7, 2, 2, 4, 2)
        logits = self.logits(self.queries).view(1, 7, 2, 2, 4)
        found = ms_deform_attn_fused(value, self.levels, None, self.points, offsets, logits)
        locations = self.points[:, :, None, :, None] + 0.01 * offsets
        found = found + ms_deform_attn(value, self.levels, None, locations, logits.softmax(-1))
        scores, labels = self.scores(found).sigmoid().max(-1)
        labels = torch.cat([labels[:, :6], torch.full_like(labels[:, 6:], -1)], 1)  # there are 6 detections
        return self.boxes(found).sigmoid() * 64, scores, labels


def call(*command):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope='module')
def detect(tmp_path_factory):
    """The example's program."""
    folder = tmp_path_factory.mktemp('cpp')
    prefix = torch.utils.cmake_prefix_path
    for command in (
        ('cmake', '-S', ROOT / 'examples' / 'cpp', '-B', folder, f'-DCMAKE_PREFIX_PATH={prefix}'),
        ('cmake', '--build', folder),
    ):
        done = call(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / 'detect'


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A package of `Detector`, an image, and what PyTorch finds in it."""
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = Detector().eval()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    (folder / 'image.ppm').write_bytes(b'P6\n64 48\n255\n' + image.tobytes())
    inputs = (torch.from_numpy(image)[None],)
    with torch.no_grad():
        outputs = model(*inputs)
        program = torch.export.export(model, inputs)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / 'model.pt2'))
    return Path(path), folder / 'image.ppm', inputs, outputs


def test_python(exported):
    package, _, inputs, expected = exported
    for output, e in zip(torch._inductor.aoti_load_package(str(package))(*inputs), expected, strict=True):
        torch.testing.assert_close(output, e, rtol=1e-4, atol=1e-4)


def test_cpp(detect, exported):
    package, image, _, (boxes, scores, labels) = exported
    done = call(detect, package, LIBRARY, image, 0)
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], dtype=float)
    expected = np.concatenate([labels[0, :6, None], scores[0, :6, None], boxes[0, :6]], 1)
    np.testing.assert_allclose(rows, expected, atol=2e-3)


def test_min_score(detect, exported):
    package, image, _, (_, scores, _) = exported
    scores = scores[:, :6]
    limit = scores.median().item() - 1e-4
    done = call(detect, package, LIBRARY, image, limit)
    assert len(done.stdout.splitlines()) == (scores > limit).sum().item() < scores.numel()


def test_errors(detect, exported, tmp_path):
    package, image, _, _ = exported
    (tmp_path / 'text.ppm').write_text('P3 1 1 255 0 0 0')
    (tmp_path / 'small.ppm').write_bytes(b'P6\n8 8\n255\n' + bytes(192))
    for arguments, message in (
        ((package, LIBRARY, tmp_path / 'text.ppm'), 'text.ppm is not a binary PPM file'),
        ((package, tmp_path / 'no.so', image), 'no.so: cannot open shared object file'),
        ((package, LIBRARY, tmp_path / 'small.ppm'), 'expected: 48, but got: 8'),
        ((tmp_path / 'no.pt2', LIBRARY, image), 'no.pt2: Failed'),
    ):
        done = call(detect, *arguments)
        assert done.returncode == 1 and 'detect: ' in done.stderr and message in done.stderr, done.stderr
    assert call(detect).returncode == 2


def test_schemas_are_those_of_python():
    """csrc/cpu/schemas.cpp repeats the schemas of msda_plugin/ops/library.py."""
    text = ''.join((ROOT / 'csrc' / 'cpu' / 'schemas.cpp').read_text().replace('"\n      "', '').split('\n'))
    for operator in (torch.ops.msda.ms_deform_attn, torch.ops.msda.ms_deform_attn_fused):
        assert f'"{str(operator.default._schema).removeprefix("msda::")}"' in text
