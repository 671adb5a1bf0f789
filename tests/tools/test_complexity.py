"""``python -m msda_plugin complexity``: its tables, its plot, and its errors."""

from pathlib import Path

import pytest

from msda_plugin import costs
from msda_plugin.tools import complexity
from msda_plugin.tools.benchmarks import growth

CONFIG = Path(__file__).parents[2] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return {cells(line)[0]: cells(line)[1:] for line in lines[2:]}


def test_formulas(capsys):
    assert complexity.main(['--map', '20', '30', '--channels', '64', '--reduction', '4', '--window', '5']) == 0
    table = rows(capsys.readouterr().out)
    for name, cost in {
        'full self-attention (Transformer)': costs.self_attention(600, 64),
        'PVT, R = 4': costs.spatial_reduction_attention(20, 30, 64, 4),
        'Swin, M = 5': costs.window_attention(20, 30, 64, 5),
        'Shunted, R = 4': costs.shunted_attention(20, 30, 64, 4),
    }.items():
        assert table[name][3] == f'{cost.macs / 1e9:.3f}'
        assert table[name][4] == f'{cost.memory * 4 / 2**20:.1f}'


def test_a_config_module_by_module(capsys):
    assert complexity.main([str(CONFIG), '--size', '64', '96', '--depth', '1']) == 0
    table = rows(capsys.readouterr().out)
    parts = {name: float(row[2]) for name, row in table.items() if name != 'DeformableDETR'}
    assert {'backbone', 'neck', 'encoder', 'decoder', 'bbox_head'} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(float(table['DeformableDETR'][2]), abs=0.01 * len(parts))
    assert float(table['DeformableDETR'][1]) == pytest.approx(3.517, abs=0.001)


def test_measures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, 'WARM_UP_SECONDS', 0)
    plot = tmp_path / 'growth.png'
    arguments = ['--measure', '16', '8', '24', '--channels', '32', '--heads', '4', '--plot', str(plot)]
    assert complexity.main(arguments) == 0
    table = rows(capsys.readouterr().out)
    assert len(table) == 7
    assert all(len(row) == 4 and float(row[0]) > 0 for row in table.values())
    assert plot.read_bytes().startswith(b'\x89PNG')


def test_growth_is_the_exponent_of_a_power_law():
    sizes = [10, 100, 200, 400]
    assert growth.exponent(sizes, [5 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [1e3, *(2 * size**2 for size in sizes[1:])]) == pytest.approx(2)
    with pytest.raises(ValueError, match='at least two sizes'):
        growth.exponent([10], [1])


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--channels', '30'], '--channels 30 is not a multiple of --heads 8'),
        (['--map', '0', '4'], '--map is 0 4, but it must be at least 1'),
        (['--reduction', '3'], '--reduction is 3, but shunted attention halves it'),
        (['--plot', 'x.png'], '--plot needs --measure with the sides'),
        (['--measure', '8'], 'at least two different sides'),
        (['--measure', '8', '16', '--plot', 'no/such/folder/x.png'], 'its folder does not exist'),
        (['--measure', '8', '16', '--device', 'tpu'], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (['missing.py'], 'the config missing.py does not exist'),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        complexity.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
