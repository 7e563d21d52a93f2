"""Old names of the experiments: they are still typed, and stored sweeps were made with them.

`experiment=figure/NAME` was `experiment=NAME`, and `experiment=paper/NAME` was `experiment=recipe_NAME`. An
experiment that is added gets no other name.
"""

import re

FIGURE = """ddpo_fig4 ddpo_first_steps ddpo_preference ddpo_sf_fig4 dpo_offline_preference
    dpo_online_preference draft_k draft_lv draft_random_k draftp_fig3 drtune overoptimisation preference
    reward_cap rwr_fig4 rwr_preference trajectory_kl""".split()
PAPER = """alignprop ddpo_aesthetic ddpo_alignment ddpo_compressibility ddpo_incompressibility diffusion_dpo
    draft draft_lv draftp trl_ddpo""".split()
MOVED = {name: f"figure/{name}" for name in FIGURE} | {f"recipe_{name}": f"paper/{name}" for name in PAPER}
"""The present name of each old one."""
FIRST = {new: old for old, new in MOVED.items()}
"""The first name of each present one."""

_WORD = re.compile(r"experiment(/\w+)?=(.*)", re.DOTALL)
_NAME = re.compile(r"[\w./-]+")


def present_word(word: str) -> str:
    """`experiment=OLD` with the present name, in each of several values; any other word as it is.

    --help lists the folders as groups of their own, so `experiment/figure=NAME` is read too.
    """
    match = _WORD.fullmatch(word)
    if not match:
        return word
    folder, values = match[1], match[2]
    if folder:
        return f"experiment={_NAME.sub(lambda name: f'{folder[1:]}/{name[0]}', values)}"
    return f"experiment={_NAME.sub(lambda name: MOVED.get(name[0], name[0]), values)}"


def first_word(word: str) -> str:
    """`experiment=NAME` with the experiment's first name, by which stored jobs are found; any other word
    as it is."""
    key, _, name = word.partition("=")
    return f"{key}={FIRST[name]}" if key == "experiment" and name in FIRST else word
