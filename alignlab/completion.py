"""alignlab completion bash

Prints what lets a shell complete commands, groups, keys and values. The shell reads it at its start:

    bash    eval "$(alignlab completion bash)"                     in ~/.bashrc
    zsh     eval "$(alignlab completion zsh)"                      in ~/.zshrc, after compinit
    fish    alignlab completion fish > ~/.config/fish/completions/alignlab.fish
"""

import sys

from alignlab.config.completion import SCRIPTS


def main() -> None:
    """Prints the script for the shell that is named. Another word ends the process with code 2."""
    words = sys.argv[1:]
    if len(words) != 1 or words[0] not in SCRIPTS:
        said = " ".join(words) or "nothing"
        print(f"error: completion of {said}: name one shell, {', '.join(SCRIPTS)}", file=sys.stderr)
        sys.exit(2)
    print(SCRIPTS[words[0]], end="")


if __name__ == "__main__":
    main()
