"""Models by name: the configs of msda_plugin and MMDetection, and the files of published weights in their metafiles."""

import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

import msda_plugin
from msda_plugin import safe_loading
from msda_plugin.convert import convert, load_checkpoint_file
from msda_plugin.engine.messages import listed
from msda_plugin.files import atomic_write
from msda_plugin.version import __version__

# Folders of MMDetection's detection transformers. Those that need a text prompt are left out.
DETR_FAMILY = ('conditional_detr', 'dab_detr', 'ddq', 'deformable_detr', 'detr', 'dino', 'mask2former')
_YamlLoader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # the former is ten times as fast


@dataclass(frozen=True)
class Model:
    """A config, and the weights published for it.

    Attributes:
        name: Name of the config or, for published weights, in the metafile.
        config: Config file.
        weights: URL of the published checkpoint, or None.
        box_ap: Published box AP on COCO val in percent, or None.
        converter: Family of `msda_plugin.convert` that the checkpoint belongs to; None: its keys fit the config.
        data: What the schedule of the config is made for.
        parameters: Number of trainable parameters, or None if it is not recorded.
        detr_family: Whether it is a detection transformer of MMDetection, or one of msda_plugin's models.
    """

    name: str
    config: Path
    weights: str | None = None
    box_ap: float | None = None
    converter: str | None = None
    data: str = 'small data sets'
    parameters: int | None = None
    detr_family: bool = True


def config_folder() -> Path:
    """The folder of msda_plugin's configs: in the installed package, or in the clone that it is installed from."""
    package = Path(msda_plugin.__file__).parent
    folders = [package / '.mim' / 'configs', package.parent / 'configs']
    for folder in folders:
        if (folder / '_base_').is_dir():
            return folder
    raise FileNotFoundError(
        f'the configs of msda_plugin are neither in {folders[0]} nor in {folders[1]}; reinstall msda_plugin'
    )


def models() -> dict[str, Model]:
    """All models by name: msda_plugin's configs, and those of MMDetection with published weights.

    For a name that both have, the config is msda_plugin's and the weights are MMDetection's: the keys are the same.
    """
    own = config_folder()
    bases = {path.stem: Model(path.stem, path) for path in sorted(own.glob('_base_/models/*.py'))}
    known = dict(bases)
    for model in _metafile_models(own.parent):
        known[model.name] = model
        for base in bases.values():
            if model.name.startswith(f'{base.name}_') and known[base.name] is base:
                known[base.name] = replace(base, parameters=model.parameters)
    mmdet = _mmdet_folder()
    for model in _metafile_models(mmdet) if mmdet else ():
        if model.name in known:
            known[model.name] = replace(known[model.name], weights=model.weights, box_ap=model.box_ap)
        elif model.weights:
            known[model.name] = model
    return known


def _metafile_models(folder: Path) -> Iterator[Model]:
    """The models of ``{folder}/configs/*/metafile.yml`` whose config files exist."""
    for metafile in sorted(folder.glob('configs/*/metafile.yml')):
        content = yaml.load(metafile.read_text('utf-8'), _YamlLoader)
        content = content if isinstance(content, dict) else dict(Models=content)
        collections = {entry['Name']: entry.get('Metadata') or {} for entry in content.get('Collections') or []}
        for entry in content.get('Models') or []:
            config, metadata = folder / entry.get('Config', ''), entry.get('Metadata') or {}
            if config.is_file():
                metrics = [result.get('Metrics') or {} for result in entry.get('Results') or []]
                data = collections.get(entry.get('In Collection'), {}).get('Training Data', 'COCO')
                yield Model(
                    name=entry['Name'].strip(),
                    config=config,
                    weights=entry.get('Weights'),
                    box_ap=next((scores['box AP'] for scores in metrics if 'box AP' in scores), None),
                    converter=metadata.get('Converter'),
                    data=data if isinstance(data, str) else ', '.join(data),
                    parameters=metadata.get('Parameters'),
                    detr_family=folder == config_folder().parent or metafile.parent.name in DETR_FAMILY,
                )


def find_model(name: str) -> Model:
    """A model by its name, by the part of its name before an underscore if only one continues so, or by a config file.

    Raises:
        ValueError: If there is no such model, or several; the message lists similar names.
    """
    if name.endswith('.py') and Path(name).is_file():
        return Model(Path(name).stem, Path(name))
    known = models()
    if name in known:
        return known[name]
    found = [other for other in known if other.startswith(f'{name}_')]
    if len(found) == 1:
        return known[found[0]]
    similar = found or [other for other in known if name in other and known[other].detr_family]
    similar = similar or difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    raise ValueError(
        f"{'several models match' if found else 'unknown model'} '{name}'"
        + (f'; did you mean {listed(similar, 5)}?' if similar else ';')
        + ' python -m msda_plugin models lists them'
    )


def download_weights(model: Model, folder: str | os.PathLike | None = None) -> Path:
    """Download the published checkpoint once, verify the hash in its name, and convert the authors' keys.

    Args:
        model: The model.
        folder: Where the files are stored; None: torch.hub's folder of checkpoints.

    Returns:
        Path of a checkpoint that fits ``model.config``.

    Raises:
        OSError: If the file is neither there nor can be downloaded.
        ValueError: If no weights are published, the hash of the file is not the one in its name, or its keys are not
            those of the family.
    """
    if model.weights is None:
        raise ValueError(
            f'no weights are published for {model.name}; give a checkpoint, or a model that python -m msda_plugin '
            'models lists with an AP'
        )
    path = safe_loading.fetch(model.weights, folder, progress=sys.stderr.isatty())
    if model.converter is None:
        return path
    converted = path.with_name(f'{path.stem}.msda_plugin_{__version__}{path.suffix}')
    if not converted.is_file():
        conversion = convert(load_checkpoint_file(path), model.converter)
        with atomic_write(converted) as part:
            torch.save(dict(state_dict=conversion.state_dict, meta=dict(source=model.weights)), part)
    return converted


def _mmdet_folder() -> Path | None:
    """The folder in MMDetection's package that holds ``configs``, found without importing it; None if there is none."""
    spec = find_spec('mmdet')
    locations = list(spec.submodule_search_locations or []) if spec else []
    folders = [folder for location in locations for folder in (Path(location, '.mim'), Path(location).parent)]
    return next((folder for folder in folders if (folder / 'configs' / '_base_').is_dir()), None)
