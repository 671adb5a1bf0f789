import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from msda_plugin import registry  # noqa: F401  (importing it is what allows the types)


def test_a_message_hub_loads_with_weights_only(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    state = {
        'message_hub': {
            'log_scalars': {'train/loss': buffer},
            'runtime_info': {'best': np.float64(0.5), 'epoch': np.int64(3)},
        }
    }
    torch.save(state, tmp_path / 'epoch_1.pth')
    loaded = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['message_hub']
    np.testing.assert_array_equal(loaded['log_scalars']['train/loss'].data[0], [1.0, 2.0])
    assert loaded['runtime_info'] == {'best': 0.5, 'epoch': 3}


@pytest.mark.parametrize('package', [b'core', b'_core'])
def test_a_checkpoint_of_the_other_numpy_loads(package, tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({'loss': buffer, 'best': np.float64(0.5)}, tmp_path / 'here.pth')
    with zipfile.ZipFile(tmp_path / 'here.pth') as here, zipfile.ZipFile(tmp_path / 'other.pth', 'w') as other:
        for name in here.namelist():
            content = re.sub(rb'cnumpy\._?core\.', b'cnumpy.' + package + b'.', here.read(name))
            assert not name.endswith('data.pkl') or content.count(b'cnumpy.' + package + b'.multiarray') == 2
            other.writestr(name, content)
    loaded = _load_checkpoint(str(tmp_path / 'other.pth'))
    assert loaded['best'] == 0.5
    np.testing.assert_array_equal(loaded['loss'].data[0], [1.0, 2.0])


class Payload:
    def __reduce__(self):
        return print, ('executed',)


class Attribute:
    """Pickles as a call of `getattr` on a permitted class."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@pytest.mark.parametrize('meta', [Payload(), Attribute()], ids=['call', 'getattr'])
def test_nothing_else_is_let_through(meta, tmp_path, capsys):
    path = str(tmp_path / 'bad.pth')
    torch.save({'state_dict': {}, 'meta': meta}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match='holds more than tensors|cannot be read'):
        load_checkpoint(torch.nn.Linear(1, 1), path)
    assert 'executed' not in capsys.readouterr().out


def test_mmengine_loads_its_own(tmp_path):
    model = torch.nn.Linear(2, 3)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save({'state_dict': model.state_dict(), 'message_hub': {'loss': HistoryBuffer([1.0], [1])}}, path)
    other = torch.nn.Linear(2, 3)
    for _ in range(2):
        assert load_checkpoint(other, path)['message_hub']['loss'].current() == 1.0
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=0)
