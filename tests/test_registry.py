"""`msda_plugin.NAME` resolves from any registry, in a process that has not imported the package."""

import subprocess
import sys
import textwrap

import pytest

LOOKUP = {
    'the root of MMEngine': 'from mmengine.registry import MODELS',
    'MMDetection': 'from mmdet.registry import MODELS',
    'a sibling project': """
        from mmengine.registry import MODELS as ROOT, Registry
        MODELS = Registry('model', parent=ROOT, scope='sibling')
    """,
}
NAMES = {
    'ShuntedTransformer': 'msda_plugin.backbones.shunted_transformer',
    'MultiScaleDeformableAttention': 'msda_plugin.layers.multi_scale_deformable_attention',
    'DeformableDETR': 'msda_plugin.detectors.deformable_detr',
    'DeformableDETRHead': 'msda_plugin.heads.deformable_detr_head',
}


@pytest.mark.parametrize('origin', LOOKUP)
def test_prefixed_names_resolve_without_imports(origin):
    program = textwrap.dedent(LOOKUP[origin]) + textwrap.dedent(f"""
        import sys
        assert not any(name.startswith('msda_plugin') for name in sys.modules)
        for name, module in {NAMES!r}.items():
            found = MODELS.get('msda_plugin.' + name)
            assert found is not None and found.__module__ == module, (name, found)
        from mmengine.registry import HOOKS, RUNNERS
        assert HOOKS.get('msda_plugin.TrainingReportHook') and RUNNERS.get('msda_plugin.DetectionRunner')
        print('resolved')
    """)
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith('resolved'), done.stderr


def test_the_bare_name_is_mmcvs():
    from mmengine.registry import MODELS as ROOT

    from msda_plugin.registry import MODELS

    ours = MODELS.get('msda_plugin.MultiScaleDeformableAttention')
    from mmcv.ops import MultiScaleDeformableAttention as stock

    assert ROOT.get('MultiScaleDeformableAttention') is stock
    assert ours is not stock and issubclass(ours, stock)


def test_importing_the_package_does_no_work():
    program = "import sys, msda_plugin; assert 'torch' not in sys.modules and 'mmengine' not in sys.modules"
    subprocess.run([sys.executable, '-c', program], check=True, timeout=60)
