import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from msda_plugin import registry  # noqa: F401  (importing it is what allows the types)


def test_a_message_hub_loads_with_weights_only(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    state = {'message_hub': {'log_scalars': {'train/loss': buffer},
                             'runtime_info': {'best': np.float64(0.5), 'epoch': np.int64(3)}}}
    torch.save(state, tmp_path / 'epoch_1.pth')
    loaded = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['message_hub']
    np.testing.assert_array_equal(loaded['log_scalars']['train/loss'].data[0], [1.0, 2.0])
    assert loaded['runtime_info'] == {'best': 0.5, 'epoch': 3}


class Payload:
    def __reduce__(self):
        return print, ('executed',)


def test_nothing_else_is_let_through(tmp_path, capsys):
    torch.save({'state_dict': {}, 'meta': Payload()}, tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'bad.pth', weights_only=True)
    assert 'executed' not in capsys.readouterr().out


class Attribute:
    """Pickles as a call of `getattr` on a permitted class."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_getattr_is_allowed_for_the_four_statistics_alone(tmp_path):
    torch.save({'state_dict': {}, 'meta': Attribute()}, tmp_path / 'bad.pth')
    with pytest.raises(Exception, match='__init__'):
        torch.load(tmp_path / 'bad.pth', weights_only=True)
