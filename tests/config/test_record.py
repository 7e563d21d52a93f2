"""The record of a command's configuration: typed, nested, unchangeable, and still a schema for Hydra."""

from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest
from omegaconf import OmegaConf

from alignlab.config.build import ConfigError
from alignlab.config.record import Keys, record


@dataclass
class Inner(Keys):
    """Of a group."""

    images: int = 8


@dataclass
class Outer(Keys):
    """Of a command."""

    lr: float = 1e-3
    evaluation: Inner = field(default_factory=Inner)


def test_a_record_has_the_values_and_its_groups_are_records() -> None:
    """What is not given takes the default of its group, too."""
    assert record(Outer, {"lr": 0.1, "evaluation": {"images": 2}}) == Outer(
        lr=0.1, evaluation=Inner(images=2)
    )
    assert record(Outer, {}) == Outer()


def test_a_record_does_not_change() -> None:
    """A changed one is another one, which does not change either."""
    made = record(Outer, {"lr": 0.1})
    for one in (made, made.evaluation, replace(made, lr=0.2)):
        with pytest.raises(FrozenInstanceError, match="is set already"):
            one.images = 3  # type: ignore[union-attr]
    assert made.lr == 0.1 and replace(made, lr=0.2).lr == 0.2


def test_what_is_no_key_is_told() -> None:
    """`+learning=1` on the command line is no key, in a group neither."""
    with pytest.raises(ConfigError, match="lrr is no key of this command; did you mean lr"):
        record(Outer, {"lrr": 1})
    with pytest.raises(
        ConfigError, match=r"evaluation\.image is no key of this command; did you mean evaluation\.images"
    ):
        record(Outer, {"evaluation": {"image": 1}})


def test_a_value_of_another_type_is_told() -> None:
    """A stored file can hold anything: no value is taken for what it is not, in a group neither."""
    with pytest.raises(ConfigError, match="lr=fast must be a number"):
        record(Outer, {"lr": "fast"})
    with pytest.raises(ConfigError, match=r"evaluation\.images=many must be a whole number"):
        record(Outer, {"evaluation": {"images": "many"}})
    with pytest.raises(ConfigError, match=r"evaluation\.images=1\.5 must be a whole number"):
        record(Outer, {"evaluation": {"images": 1.5}})


def test_hydra_fills_the_same_class() -> None:
    """Keys can be set, by their type, before the record is made."""
    schema = OmegaConf.structured(Outer)
    schema.lr = "0.5"
    schema.evaluation.images = 3
    made = record(Outer, OmegaConf.to_container(schema))
    assert made == Outer(lr=0.5, evaluation=Inner(images=3))
