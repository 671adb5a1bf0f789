"""The operator's nodes in onnxruntime, computed by libmsda_onnxruntime.so."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from operator_cases import grid_sample_attention, locations_and_weights, make_case

import msda_plugin
from msda_plugin.export.onnx_operator import DOMAIN, FUSED_NAME, NAME, TENSORRT_DOMAIN, TENSORRT_NAME
from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused

onnxruntime = pytest.importorskip('onnxruntime')
if not msda_plugin.libraries.LIBRARY_DIR.joinpath('libmsda_onnxruntime.so').exists():
    pytest.skip('libmsda_onnxruntime.so is not built', allow_module_level=True)

TYPES = {
    np.dtype('float32'): TensorProto.FLOAT,
    np.dtype('float16'): TensorProto.FLOAT16,
    np.dtype('float64'): TensorProto.DOUBLE,
    np.dtype('int32'): TensorProto.INT32,
    np.dtype('int64'): TensorProto.INT64,
}
NAMES = {
    NAME: ('value', 'spatial_shapes', 'sampling_locations', 'attention_weights'),
    FUSED_NAME: ('value', 'spatial_shapes', 'reference_points', 'sampling_offsets', 'attention_logits'),
    TENSORRT_NAME: ('value', 'spatial_shapes', 'level_start_index', 'sampling_locations', 'attention_weights'),
}
RANKS = dict(
    value=4,
    spatial_shapes=2,
    level_start_index=1,
    reference_points=4,
    sampling_locations=6,
    sampling_offsets=6,
    attention_weights=5,
    attention_logits=5,
)


def make_model(arrays, operator=NAME, shapes=None):
    """A file with one node. Its inputs have the given shapes, or unknown sizes; its output has no shape."""
    domain = TENSORRT_DOMAIN if operator == TENSORRT_NAME else DOMAIN
    inputs = [
        helper.make_tensor_value_info(name, TYPES[arrays[name].dtype], (shapes or {}).get(name, [None] * RANKS[name]))
        for name in NAMES[operator]
    ]
    output = helper.make_tensor_value_info('output', TYPES[arrays['value'].dtype], None)
    node = helper.make_node(operator, NAMES[operator], ['output'], domain=domain, name='attention')
    graph = helper.make_graph([node], 'graph', inputs, [output])
    opsets = [helper.make_opsetid('', 16), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def make_session(model, threads=1):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(msda_plugin.onnxruntime_library())
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])


def make_arrays(dtype='float32', sampling=None, shapes_dtype='int64', seed=0, **sizes):
    """The inputs of all nodes by name, and the case."""
    case = make_case(seed=seed, **sizes).to(getattr(torch, dtype))
    shapes = torch.tensor(case.shapes)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    arrays = dict(
        value=case.value.numpy(),
        spatial_shapes=shapes.numpy().astype(shapes_dtype),
        level_start_index=starts.numpy().astype(shapes_dtype),
        sampling_locations=case.locations.numpy().astype(sampling or dtype),
        attention_weights=case.weights.numpy().astype(sampling or dtype),
        reference_points=case.reference_points.numpy(),
        sampling_offsets=case.offsets.numpy().astype(sampling or dtype),
        attention_logits=case.logits.numpy().astype(sampling or dtype),
    )
    return arrays, case


def run(arrays, operator=NAME, threads=1, session=None):
    session = session or make_session(make_model(arrays, operator), threads)
    return session.run(None, {name: arrays[name] for name in NAMES[operator]})[0]


def expected(case, operator=NAME):
    exact = case.to(torch.float64)
    if operator == FUSED_NAME:
        locations, weights = locations_and_weights(case.shapes, *exact.fused()[1:])
        return grid_sample_attention(exact.value, case.shapes, locations, weights).numpy()
    return grid_sample_attention(exact.value, case.shapes, exact.locations, exact.weights).numpy()


@pytest.mark.parametrize('head_dim', [1, 7, 8, 32, 33])
@pytest.mark.parametrize('shapes', [((5, 7), (3, 2), (1, 1)), ((1, 1),), ((1, 9), (9, 1))])
def test_float32(head_dim, shapes):
    arrays, case = make_arrays(shapes=shapes, head_dim=head_dim, queries=5, spread=0.7)
    output = run(arrays)
    assert output.shape == (2, 5, 2 * head_dim) and output.dtype == np.float32
    np.testing.assert_allclose(output, expected(case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sampling', ['float16', 'float32'])
@pytest.mark.parametrize('operator', [NAME, FUSED_NAME])
def test_float16(sampling, operator):
    arrays, case = make_arrays('float16', sampling, head_dim=24)
    arrays['reference_points'] = arrays['reference_points'].astype(sampling)
    output = run(arrays, operator)
    assert output.dtype == np.float16
    np.testing.assert_allclose(output, expected(case, operator), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('reference_size', [2, 4])
@pytest.mark.parametrize('points', [1, 3, 4])
def test_fused_node(reference_size, points):
    arrays, case = make_arrays(reference_size=reference_size, points=points, head_dim=8)
    np.testing.assert_allclose(run(arrays, FUSED_NAME), expected(case, FUSED_NAME), rtol=1e-4, atol=1e-5)


def test_fused_node_with_float32_reference_points():
    arrays, case = make_arrays('float16')
    arrays['reference_points'] = arrays['reference_points'].astype('float32')
    np.testing.assert_allclose(run(arrays, FUSED_NAME), expected(case, FUSED_NAME), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('float16', 1e-3)])
@pytest.mark.parametrize('shapes_dtype', ['int32', 'int64'])
def test_tensorrt_node(dtype, tolerance, shapes_dtype):
    arrays, case = make_arrays(dtype, shapes_dtype=shapes_dtype, head_dim=16, heads=3)
    output = run(arrays, TENSORRT_NAME)
    assert output.shape == (2, 4, 3, 16)
    np.testing.assert_allclose(output.reshape(2, 4, 48), expected(case), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(backend_for('cpu', torch.float32).name != 'cpu', reason='libmsda_cpu is not built')
@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('batch, heads', [(1, 1), (1, 3), (3, 2)])
def test_bitwise_equal_to_torch_for_any_number_of_threads(threads, batch, heads):
    """The sizes are large enough for several slices of each head."""
    arrays, case = make_arrays(shapes=((29, 31), (11, 13)), batch=batch, heads=heads, queries=1201, head_dim=16)
    for operator, function in ((NAME, ms_deform_attn), (FUSED_NAME, ms_deform_attn_fused)):
        value, _, *rest = (torch.from_numpy(arrays[name]) for name in NAMES[operator])
        output = function(value, case.shapes, None, *rest)
        assert np.array_equal(run(arrays, operator, threads), output.numpy())


@pytest.mark.parametrize('operator', NAMES)
@pytest.mark.parametrize('empty', ['batch', 'queries'])
def test_empty(operator, empty):
    arrays, _ = make_arrays(**{empty: 0})
    output = run(arrays, operator)
    assert output.shape[:2] == ((0, 4) if empty == 'batch' else (2, 0))


def test_one_session_for_all_sizes():
    arrays, case = make_arrays()
    session = make_session(make_model(arrays))
    for sizes in ({}, dict(batch=3, queries=9), dict(shapes=((2, 3), (8, 1)), points=5, heads=1), dict(batch=0)):
        arrays, case = make_arrays(**sizes)
        np.testing.assert_allclose(run(arrays, session=session), expected(case), rtol=1e-5, atol=1e-6)


def test_levels_as_int32():
    arrays, case = make_arrays(shapes_dtype='int32')
    np.testing.assert_allclose(run(arrays), expected(case), rtol=1e-5, atol=1e-6)


def test_not_a_number():
    """NaN and infinite locations contribute nothing, as in torch."""
    _, case = make_arrays()
    arrays, _ = make_arrays()
    arrays['sampling_locations'][0, 0, 0, 0] = [[np.nan, 0.5], [np.inf, 0.5], [0.5, -np.inf]]
    case.weights[0, 0, 0, 0] = 0
    np.testing.assert_allclose(run(arrays), expected(case), rtol=1e-5, atol=1e-6)


def test_sessions_and_threads():
    """Threads that run shared sessions, and create and drop their own, do not disturb one another."""
    cases = [make_arrays(shapes=((17, 19), (5, 3)), queries=333 + i, head_dim=8, seed=i) for i in range(4)]
    expectations = [run(arrays) for arrays, _ in cases]
    shared = make_session(make_model(cases[0][0]), threads=2)
    failures = []

    def work(i):
        try:
            for turn in range(12):
                session = shared if turn % 3 else make_session(make_model(cases[0][0]))
                k = (i + turn) % 4
                if not np.array_equal(run(cases[k][0], session=session), expectations[k]):
                    failures.append((i, turn))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


BAD_INPUTS = {
    'value': [
        ((2, 42, 12), 'value has shape (2, 42, 12), but (bs, num_keys, num_heads, head_dim) with at least one head'),
        (
            (2, 42, 0, 6),
            'value has shape (2, 42, 0, 6), but (bs, num_keys, num_heads, head_dim) with at least one head',
        ),
        ((2, 41, 2, 6), 'areas must add up to 41, the number of keys in value'),
        ((2, 43, 2, 6), 'whose areas add up to 42, but value has 43 keys'),
        ((3, 42, 2, 6), 'sampling_locations has shape (2, 4, 2, 3, 3, 2), but (3, 4, 2, 3, 3, 2) is needed'),
    ],
    'spatial_shapes': [
        ((3,), 'spatial_shapes has shape (3), but (num_levels, 2) with at least one level is needed'),
        ((3, 3), 'spatial_shapes has shape (3, 3), but (num_levels, 2)'),
        ((0, 2), 'spatial_shapes has shape (0, 2), but (num_levels, 2) with at least one level'),
        ((2, 2), 'sampling_locations has shape (2, 4, 2, 3, 3, 2), but (2, 4, 2, 2, 3, 2) is needed'),
        (np.array([[5, 7], [3, 2], [0, 1]]), 'spatial_shapes is (5, 7, 3, 2, 0, 1), but each (h, w) must be positive'),
        (np.array([[-5, -7], [3, 2], [1, 1]]), 'each (h, w) must be positive'),
        (np.array([[2**62, 4], [3, 2], [1, 1]]), 'each (h, w) must be positive'),
    ],
    'level_start_index': [
        ((2,), 'level_start_index has shape (2), but (3) is needed'),
        (np.array([0, 35, 40]), 'level_start_index is (0, 35, 40), but the running sum of the levels'),
    ],
    'reference_points': [
        ((2, 4, 3), 'reference_points has shape (2, 4, 3), but (bs, num_queries, num_levels) = (2, 4, 3) with 2 or 4'),
        ((2, 4, 3, 3), 'reference_points has shape (2, 4, 3, 3), but'),
        ((2, 4, 1, 2), 'reference_points has shape (2, 4, 1, 2), but'),
    ],
    'sampling_offsets': [((2, 4, 2, 3, 3, 3), 'sampling_offsets has shape (2, 4, 2, 3, 3, 3), but (2, 4, 2, 3, 3, 2)')],
    'attention_logits': [((2, 4, 2, 3, 4), 'attention_logits has shape (2, 4, 2, 3, 4), but (2, 4, 2, 3, 3) is')],
    'sampling_locations': [
        ((2, 4, 2, 3, 3), 'sampling_locations has shape (2, 4, 2, 3, 3), but (bs, num_queries, num_heads, num_levels'),
        ((2, 4, 2, 3, 0, 2), 'with at least one point'),
        ((2, 4, 2, 3, 3, 3), 'sampling_locations has shape (2, 4, 2, 3, 3, 3), but (2, 4, 2, 3, 3, 2) is needed'),
    ],
    'attention_weights': [
        ((2, 4, 2, 3, 4), 'attention_weights has shape (2, 4, 2, 3, 4), but (2, 4, 2, 3, 3) is needed'),
        ((2, 4, 2, 9), 'attention_weights has shape (2, 4, 2, 9), but (2, 4, 2, 3, 3) is needed'),
    ],
}


@pytest.mark.parametrize('name, bad, message', [(n, *case) for n, cases in BAD_INPUTS.items() for case in cases])
def test_bad_input_is_one_sentence(name, bad, message):
    """The session stays usable."""
    arrays, case = make_arrays()
    good = make_arrays()[0]
    arrays[name] = np.zeros(bad, arrays[name].dtype) if isinstance(bad, tuple) else bad
    operator = next(operator for operator, names in NAMES.items() if name in names)
    unknown = {name: None for name in NAMES[operator]}
    session = make_session(make_model(arrays, operator, shapes=unknown))
    with pytest.raises(Exception, match=re.escape(message)):
        run(arrays, operator, session=session)
    output = run(good, operator, session=session)
    np.testing.assert_allclose(output.reshape(2, 4, 12), expected(case, operator), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'operator, types, message',
    [
        (NAME, dict(value='float64', sampling_locations='float64', attention_weights='float64'), 'tensor(double)'),
        (NAME, dict(attention_weights='float64'), 'tensor(double)'),
        (NAME, dict(sampling_locations='float16', attention_weights='float16'), 'value is float32, sampling_locations'),
        (NAME, dict(value='float16', attention_weights='float16'), 'sampling_locations is float32, attention_weights'),
        (TENSORRT_NAME, dict(value='float16'), 'attention_weights is float32, but one dtype is needed'),
        (FUSED_NAME, dict(reference_points='float16'), 'reference_points is float16, sampling_offsets is float32, '),
    ],
)
def test_mismatching_dtypes_are_refused_by_the_session(operator, types, message):
    arrays, _ = make_arrays()
    for name, dtype in types.items():
        arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(Exception, match=re.escape(message)):
        make_session(make_model(arrays, operator))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_shape_of_the_output_is_inferred(dtype):
    arrays, _ = make_arrays(dtype)
    shapes = dict(value=['batch', 'keys', 2, 6], sampling_locations=['b', 'queries', 2, 3, 3, 2])
    (output,) = make_session(make_model(arrays, shapes=shapes)).get_outputs()
    assert output.shape == ['batch', 'queries', 12] and ('float16' in output.type) == (dtype == 'float16')
    (output,) = make_session(make_model(arrays, TENSORRT_NAME, shapes=shapes)).get_outputs()
    assert output.shape == ['batch', 'queries', 2, 6]
    fixed = dict(value=[2, 42, 2, 6], sampling_locations=[2, 4, 2, 3, 3, 2])
    (output,) = make_session(make_model(arrays, shapes=fixed)).get_outputs()
    assert output.shape == [2, 4, 12]
    # Sizes without a name could be unequal: the shape stays unknown.
    (output,) = make_session(make_model(arrays)).get_outputs()
    assert not any(isinstance(size, int) and size < 0 for size in output.shape or [])


def test_optimized_file_keeps_the_node(tmp_path):
    arrays, _ = make_arrays()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(msda_plugin.onnxruntime_library())
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    output = run(arrays, session=onnxruntime.InferenceSession(make_model(arrays).SerializeToString(), options))
    assert np.array_equal(run(arrays, session=make_session(onnx.load(tmp_path / 'optimized.onnx'))), output)


def test_without_the_library_onnxruntime_names_the_node():
    arrays, _ = make_arrays()
    with pytest.raises(Exception, match='MSDeformAttn'):
        onnxruntime.InferenceSession(make_model(arrays).SerializeToString())


def test_older_onnxruntime_is_refused():
    """A stand-in for an onnxruntime 1.16, which has no API of version 17."""
    messages = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        messages.append(message.decode())
        return 1

    entries = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def table(version):
        return ctypes.addressof(entries) if version <= 16 else None

    number = ctypes.create_string_buffer(b'1.16.3')

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def version():
        return ctypes.addressof(number)

    base = (ctypes.c_void_p * 2)(ctypes.cast(table, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p))
    register = ctypes.CDLL(msda_plugin.onnxruntime_library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert messages == [
        "msda_plugin's operators need onnxruntime 1.17 or newer, but this is 1.16.3: upgrade onnxruntime"
    ]


@pytest.mark.skipif(shutil.which('nm') is None, reason='there is no nm')
def test_library_needs_no_torch():
    def symbols(kind):
        command = ['nm', '-D', kind, msda_plugin.onnxruntime_library()]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {line.split()[-1].partition('@')[0] for line in lines if ' T ' in line or ' U ' in line}

    assert symbols('--defined-only') == {'RegisterCustomOps'}
    foreign = re.compile(r'torch|aoti|at_|Py|_ZNK?(2at|3c10|5torch)')
    assert not [name for name in symbols('--undefined-only') if foreign.match(name)]


def test_path_is_known_without_torch_and_a_missing_library_is_one_error(tmp_path):
    program = """
import sys, msda_plugin
try:
    print(msda_plugin.onnxruntime_library())
except FileNotFoundError as error:
    print(error)
assert not {'torch', 'numpy', 'mmcv', 'mmengine'} & set(sys.modules)
"""

    def output(**environment):
        done = subprocess.run(
            [sys.executable, '-c', program], capture_output=True, text=True, env={**os.environ, **environment}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert output() == msda_plugin.onnxruntime_library()
    missing = output(MSDA_LIBRARY_DIR=str(tmp_path))
    assert missing.startswith(f'{tmp_path}/libmsda_onnxruntime.so was not built: run "python csrc/build.py"')
