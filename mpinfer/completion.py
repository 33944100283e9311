"""Shell completion, as a script made of the command line's own parser."""

import argparse
from collections.abc import Iterator

_BASH = r"""# Completion of mpinfer's commands, options and keys of the job file.
_mpinfer() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
    case "$previous" in
        --set)
            compopt -o nospace 2>/dev/null
            COMPREPLY=($(compgen -W "{keys}" -- "$current"))
            return
            ;;
    esac
    local typed=" ${{COMP_WORDS[*]:1:COMP_CWORD - 1}} "
    case "$typed" in
{cases}
    esac
    [[ $COMP_CWORD == 1 ]] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _mpinfer mpinfer
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"  # zsh runs bash's completions


def completion_script(parser: argparse.ArgumentParser, shell: str, keys: list[str]) -> str:
    """What a user's shell evaluates; `keys` of the job file complete `--set`."""
    commands = dict(_commands(parser))
    options = {name: " ".join(_options(command)) for name, command in commands.items()}
    for name in commands:  # the second word of a command of two follows the first
        first, _, second = name.partition(" ")
        if second:
            options[first] += f" {second}"
    script = _BASH.format(
        keys=" ".join(f"{key}=" for key in keys),
        cases="\n".join(
            f'        " {name} "*) words="{words}" ;;' for name, words in sorted(options.items(), key=_longest_first)
        ),
        commands=" ".join(name for name in commands if " " not in name),
    )
    return _ZSH + script if shell == "zsh" else script


def _longest_first(entry: tuple[str, str]) -> int:
    return -len(entry[0])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _options(command: argparse.ArgumentParser) -> Iterator[str]:
    """What can follow a command: its options, and its own commands and choices."""
    for action in command._actions:
        yield from action.option_strings
        if not action.option_strings:
            yield from map(str, action.choices or ())
