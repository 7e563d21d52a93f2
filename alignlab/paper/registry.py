"""The list of the papers' figures: the sweeps that each needs, what it asks their weights, its drawing.

What is printed beside a figure (its title, whose figure it is, how to read it) stands in
conf/figure/NAME.yaml.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from alignlab.compare.run_files import Settings
from alignlab.config.compose import CONF
from alignlab.files.bounded_yaml import read_yaml
from alignlab.paper import ddpo, dpo, draft, draftp, fronts
from alignlab.paper.drawing import SHOWN_KL, Rows, Runs

SHOWN_SEED = 2
"""Of the runs whose pictures are shown: the last of three."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question to the weights of some runs (probes.py)."""

    question: str
    experiment: str
    of: Callable[[Settings], bool]
    """Which runs."""


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """What one figure shows, and what it is made of."""

    title: str
    source: str
    """Whose figure it is."""
    note: str
    """How to read it."""
    draw: Callable[[Runs], tuple[Figure, Rows]]
    experiments: tuple[str, ...]
    """conf/experiment/figure: the sweeps."""
    probes: tuple[Ask, ...] = ()


def texts(name: str) -> dict[str, Any]:
    """The title, source and note of a figure; what several notes say is filled in."""
    folder = CONF / "figure"
    node, shared = (
        read_yaml((folder / f"{stem}.yaml").read_text(encoding="utf-8")) for stem in (name, "shared")
    )
    return {key: text.format_map(shared) for key, text in node.items()}


def shown(settings: Settings) -> bool:
    return settings.quick or settings.seed == SHOWN_SEED


PREFERENCE = ("draftp_fig3", "ddpo_preference")
FIGURES: dict[str, PaperFigure] = {
    "draftp_fig3": PaperFigure(
        **texts("draftp_fig3"),
        draw=draftp.draftp_fig3,
        experiments=PREFERENCE,
    ),
    "draftp_fig4": PaperFigure(
        **texts("draftp_fig4"),
        draw=draftp.draftp_fig4,
        experiments=PREFERENCE,
        probes=tuple(Ask(question="lion", experiment=name, of=shown) for name in PREFERENCE),
    ),
    "draftp_fig5": PaperFigure(
        **texts("draftp_fig5"),
        draw=draftp.draftp_fig5,
        experiments=("draftp_fig3",),
        probes=(
            Ask(
                question="varied",
                experiment="draftp_fig3",
                of=lambda its: shown(its) and its.kl_coeff == SHOWN_KL,
            ),
        ),
    ),
    "ddpo_fig4": PaperFigure(
        **texts("ddpo_fig4"),
        draw=ddpo.ddpo_fig4,
        experiments=("ddpo_fig4", "ddpo_first_steps", "ddpo_sf_fig4", "rwr_fig4"),
    ),
    "ddpo_generalisation": PaperFigure(
        **texts("ddpo_generalisation"),
        draw=ddpo.ddpo_generalisation,
        experiments=("ddpo_preference", "ddpo_fig4"),
        probes=(
            Ask(question="generalisation", experiment="ddpo_preference", of=lambda _: True),
            Ask(
                question="generalisation",
                experiment="ddpo_fig4",
                of=lambda its: "emoji_aesthetic" in its.rewards,
            ),
        ),
    ),
    "k_laws": PaperFigure(
        **texts("k_laws"),
        draw=draft.k_laws,
        experiments=("draftp_fig3", "draft_k", "draft_random_k", "draft_lv", "drtune"),
    ),
    "fronts": PaperFigure(
        **texts("fronts"),
        draw=fronts.fronts,
        experiments=("draftp_fig3", "trajectory_kl", "reward_cap", "draft_k"),
        probes=(Ask(question="dials", experiment="draftp_fig3", of=lambda its: its.kl_coeff == 0),),
    ),
    "draft_speed": PaperFigure(
        **texts("draft_speed"),
        draw=draft.draft_speed,
        experiments=(*PREFERENCE, "rwr_preference"),
    ),
    "preferences": PaperFigure(
        **texts("preferences"),
        draw=dpo.preferences,
        experiments=(
            "draftp_fig3",
            "ddpo_preference",
            "rwr_preference",
            "dpo_offline_preference",
            "dpo_online_preference",
        ),
    ),
    "overoptimisation": PaperFigure(
        **texts("overoptimisation"),
        draw=draft.overoptimisation,
        experiments=("overoptimisation",),
    ),
}
"""The figures of the papers, in the order in which name=all makes them."""
