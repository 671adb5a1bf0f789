"""``python -m msda_plugin COMMAND``: one module of `msda_plugin.tools` a command, imported when it is called."""

import sys
from importlib import import_module

COMMANDS = {
    'env': 'say what is installed, which backend runs for what, and what is wrong',
    'shapes': 'write the generated COCO-format data set',
    'train': 'train a detector from a config, or on own data in COCO format',
    'test': 'evaluate a checkpoint',
    'demo': 'draw the detected boxes on images, folders and videos',
    'visualize': 'show what the attention of a detector looks at, as pictures and as a page',
    'convert': 'turn a published checkpoint into ours, with an account of every key',
    'complexity': 'say what attention costs: by formula, for a config, and by the clock',
    'mmcv-ops': 'run mmcv without its compiled operators: install, remove, status',
    'benchmark': 'time the operator and the models against the stock ones, side by side',
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {what}' for name, what in COMMANDS.items()]
    return '\n'.join(
        [
            'usage: python -m msda_plugin COMMAND [ARGUMENTS]',
            '',
            *lines,
            '',
            'python -m msda_plugin COMMAND --help tells more of a command.',
        ]
    )


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(usage())
        return 0
    if command not in COMMANDS:
        print(f'msda_plugin: there is no command {command!r}; choose one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    try:
        return import_module(f'msda_plugin.tools.{command.replace("-", "_")}').main(rest)
    except KeyboardInterrupt:
        print(f'\nmsda_plugin {command}: stopped by Ctrl-C', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
