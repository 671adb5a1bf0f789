"""``python -m msda_plugin COMMAND``, and the executable ``msda-plugin``.

Each command is a module of `msda_plugin.tools`, imported when it is called.
"""

import os
import sys
from importlib import import_module

from msda_plugin.version import __version__

COMMANDS = {
    'env': 'print installed versions, GPUs and backends, and check for problems',
    'shapes': 'generate a data set of drawn shapes or scenes in COCO format',
    'train': 'train a detector from a config, or on your data (COCO, YOLO, Pascal VOC)',
    'test': 'evaluate a checkpoint',
    'demo': 'draw detected boxes on images, folders and videos',
    'export': 'write a detector for ONNX, AOTInductor or OpenVINO, and compare the file with PyTorch',
    'visualize': 'visualize the attention of a detector as images and an HTML page',
    'models': 'list the models and published weights that --model takes',
    'convert': 'convert a published checkpoint, with a report on every key',
    'complexity': 'count the operations and memory of attention or of a model, or time attention',
    'mmcv-ops': "provide mmcv's operators if mmcv was installed without compiling",
    'benchmark': 'time operator, layers and models against the stock implementations',
}
BROKEN_PIPE = 141  # exit status after SIGPIPE, by the convention of shells


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {description}' for name, description in COMMANDS.items()]
    return '\n'.join(
        [
            'usage: python -m msda_plugin COMMAND [ARGUMENTS]',
            '',
            *lines,
            '',
            'COMMAND --help shows the options of a command, --version the version. msda-plugin is short for',
            'python -m msda_plugin.',
        ]
    )


def main(argv: list[str] | None = None) -> int:
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it is standard output that is closed, as in `… --help | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
            return BROKEN_PIPE
        raise


def _run(argv: list[str] | None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(usage())
        return 0
    if command == '--version':
        print(f'msda_plugin {__version__}')
        return 0
    if command not in COMMANDS:
        print(f'msda_plugin: unknown command {command!r}; choose one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    try:
        return import_module(f'msda_plugin.tools.{command.replace("-", "_")}').main(rest)
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] not in ('torch', 'mmengine', 'mmcv', 'mmdet'):
            raise
        print(f'msda_plugin {command}: {error}; "python -m msda_plugin env" says how to fix it', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'\nmsda_plugin {command}: stopped by Ctrl-C', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
