from mmengine.config import Config, ConfigDict

from msda_plugin.engine.config_walk import rebuild, walk
from msda_plugin.engine.messages import listed

CONFIG = dict(model=dict(heads=[dict(type='A'), dict(type='B')], size=(1, 2)), name='x')


def test_paths_are_those_of_cfg_options():
    found = dict(walk(CONFIG))
    assert found['model.heads.1.type'] == 'B' and found['model.size.0'] == 1 and found[''] is CONFIG
    assert [path for path, node in walk(CONFIG['model'], 'model') if isinstance(node, dict)] == [
        'model',
        'model.heads.0',
        'model.heads.1',
    ]
    cfg = Config(CONFIG)
    cfg.merge_from_dict({'model.heads.1.type': 'C'})
    assert dict(walk(cfg.model, 'model'))['model.heads.1.type'] == 'C'


def test_rebuild_copies_and_replaces():
    changed = rebuild(ConfigDict(CONFIG), lambda key, value: None if key == 'size' else value)
    assert changed == dict(CONFIG, model=dict(CONFIG['model'], size=None)) and isinstance(changed.model, ConfigDict)
    assert rebuild(CONFIG, lambda key, value: 'C' if value == 'A' else value)['model']['heads'][0] == dict(type='C')
    assert CONFIG['model']['size'] == (1, 2) and CONFIG['model']['heads'][0] == dict(type='A')


def test_long_lists_are_cut():
    assert listed('abc') == 'a, b, c' and listed([]) == 'nothing'
    assert listed(range(15), limit=3) == '0, 1, 2 and 12 more'
