"""Checkpoints that are damaged or hold something else: read as they were written, or refused in one sentence."""

import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fuzzing import fuzz, one_sentence
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from msda_plugin import compat
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import FAMILIES, convert, load_checkpoint_file

ARCH = dict(embed_dims=8, depth=1, num_heads=1, mlp_ratio=1)


def model():
    return VisionTransformer(ARCH, img_size=32)


@pytest.fixture(scope='module')
def files():
    """Bytes of a checkpoint as MMEngine writes it, in both forms of torch.save."""
    torch.manual_seed(0)
    net = model()
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        state_dict=net.state_dict(),
        meta=dict(epoch=1, dataset_meta=dict(classes=('a', 'b'))),
        optimizer=torch.optim.AdamW(net.parameters()).state_dict(),
        message_hub=dict(log_scalars={'train/loss': buffer}, runtime_info={'best': np.float64(0.5)}),
    )
    both = []
    for form in (True, False):
        torch.save(content, file := io.BytesIO(), _use_new_zipfile_serialization=form)
        both.append(file.getvalue())
    return both


def test_damaged_files(files, tmp_path, long_run):
    path = tmp_path / 'epoch_1.pth'
    edits = st.lists(
        st.tuples(
            st.floats(0, 1), st.sampled_from(('cut', 'flip', 'flip', 'insert', 'remove', 'swap')), st.integers(1, 255)
        ),
        min_size=1,
        max_size=5,
    )

    def check(case):
        number, changes = case
        data = bytearray(files[number])
        for place, how, byte in changes:
            at = int(place * max(len(data) - 1, 0))
            if how == 'cut':
                del data[at:]
            elif how == 'insert':
                data[at:at] = bytes([byte] * byte)
            elif how == 'remove':
                del data[at : at + byte]
            elif how == 'swap':
                data[at : at + 64], data[:64] = data[:64], data[at : at + 64]
            elif data:
                data[at] ^= byte
        path.write_bytes(data)
        try:
            with compat.load_checkpoints_strictly():
                CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger='silent')
        except (ValueError, OSError) as error:
            return one_sentence(error)
        return 'read'

    fuzz('damaged checkpoints', st.tuples(st.integers(0, 1), edits), 2000 if long_run else 70, check)


values = st.recursive(
    st.one_of(
        st.none(),
        st.integers(-3, 3),
        st.text(max_size=3),
        st.sampled_from(
            (
                torch.zeros(()),
                torch.zeros(8),
                torch.zeros(0),
                torch.zeros(2, 8),
                torch.zeros(1, 2, 8),
                torch.zeros(91, 8),
                torch.zeros(3, 3, 3, 3),
                torch.full((8,), float('nan')),
                torch.zeros(8, dtype=torch.int32),
            )
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=4,
)
names = st.sampled_from(
    [
        *model().state_dict(),
        'head.weight',
        'model',
        'state_dict',
        'backbone.x',
        'stages.0.x',
        'block1.0.attn.q.weight',
        'class_embed.weight',
        'class_embed.0.weight',
        '',
        'x',
        'input_proj.0.0.weight',
        'transformer.encoder.layers.0.linear1.weight',
        'layers.0.ln1.weight',
        'selections.0.x',
        'transformer.decoder.layers.0.cross_attn.sampling_offsets.weight',
        'lateral_conv.0.0.weight',
        'upbottom_conv.0.0.conv1.weight',
        'encoder.layers.0.x',
        'bbox_head.cls_branches.0.weight',
    ]
)


def test_other_contents(tmp_path, long_run):
    """A ViT's state dict with other keys, types and shapes; what every family makes of it, and the module itself."""
    path = tmp_path / 'file.pth'
    edits = st.lists(st.tuples(names, st.one_of(st.just('remove'), values)), max_size=4)
    wrappers = st.sampled_from((None, 'model', 'state_dict', 'other'))

    def check(case):
        changes, wrapper, family, whole = case
        net = model()
        content = OrderedDict(net.state_dict())
        for name, value in changes:
            if isinstance(value, str) and value == 'remove':
                content.pop(name, None)
            else:
                content[name] = value
        content = whole[0] if whole else content
        torch.save(content if wrapper is None else {wrapper: content}, path)
        ends = []
        for read in (
            lambda: convert(load_checkpoint_file(path), family),
            lambda: VisionTransformer(
                ARCH, img_size=32, init_cfg=dict(type='Pretrained', checkpoint=str(path))
            ).init_weights(),
        ):
            try:
                read()
                ends.append('read')
            except ValueError as error:
                ends.append(one_sentence(error))
            except RuntimeError as error:  # torch's list of the sizes that differ
                assert 'Error(s) in loading state_dict' in str(error)
                ends.append('sizes that differ')
        return ', '.join(ends)

    fuzz(
        'other contents',
        st.tuples(edits, wrappers, st.sampled_from(FAMILIES), st.lists(values, max_size=1)),
        1000 if long_run else 40,
        check,
    )
