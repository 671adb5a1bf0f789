"""``python -m msda_plugin models`` and ``train --model list``."""

import pytest

from msda_plugin.tools import models, train


def test_lists_detection_transformers(capsys):
    assert models.main([]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ['MODEL', 'PARAMETERS', '(M)', 'MADE', 'FOR', 'PUBLISHED', 'WEIGHTS']
    lines = {row.split()[0]: row for row in rows}
    assert lines['deformable-detr_r50_16xb2-50e_coco'].split()[1:] == ['39.8', 'COCO', 'box', 'AP', '44.3']
    assert 'small data sets' in lines['deformable-detr-two-stage_shunted-nano']
    assert 'dab-detr_r50_8xb2-50e_coco' in lines and 'retinanet_r50_fpn_1x_coco' not in lines
    assert train.main(['--model', 'list']) == 0
    assert capsys.readouterr().out.splitlines() == [header, *rows]


def test_text_selects_from_all_models(capsys):
    assert models.main(['retinanet_r50']) == 0
    assert all('retinanet_r50' in row for row in capsys.readouterr().out.splitlines()[1:])
    with pytest.raises(SystemExit):
        models.main(['xyzzy'])
    assert "no name of a model contains 'xyzzy'" in capsys.readouterr().err
