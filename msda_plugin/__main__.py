"""``python -m msda_plugin COMMAND``: one module of `msda_plugin.tools` a command, imported when it is called."""
import sys
from importlib import import_module

COMMANDS = {
    'shapes': 'write the generated COCO-format data set',
    'train': 'train a detector from a config',
    'test': 'evaluate a checkpoint',
    'benchmark': 'time the operator and the models against the stock ones, side by side',
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {what}' for name, what in COMMANDS.items()]
    return '\n'.join(['usage: python -m msda_plugin COMMAND [ARGUMENTS]', '', *lines, '',
                      'python -m msda_plugin COMMAND --help tells more of a command.'])


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(usage())
        return 0
    if command not in COMMANDS:
        print(f'msda_plugin: there is no command {command!r}; choose one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    return import_module(f'msda_plugin.tools.{command}').main(rest)


if __name__ == '__main__':
    sys.exit(main())
