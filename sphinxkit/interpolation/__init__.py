"""Weight mixing: pure functions of tensors (``ops``), methods, rules, and lazy mixes of whole models."""

from sphinxkit.interpolation import methods as _methods
from sphinxkit.interpolation.methods import MixMethod
from sphinxkit.interpolation.mix_plan import MixPlan
from sphinxkit.interpolation.ops import (
    dare,
    ema,
    greedy_soup,
    lerp,
    linear,
    slerp,
    task_arithmetic,
    ties,
    uniform_soup,
    wise_ft,
)
from sphinxkit.interpolation.rules import Rule, parse_rules
from sphinxkit.interpolation.streaming import MixedSource, update_in_place
from sphinxkit.registry import Registry

registry: Registry[MixMethod] = Registry(
    "mixing method",
    {
        "dare": _methods.dare,
        "ema": _methods.ema,
        "linear": _methods.linear,
        "slerp": _methods.slerp,
        "task_arithmetic": _methods.task_arithmetic,
        "ties": _methods.ties,
        "uniform_soup": _methods.uniform_soup,
        "wise_ft": _methods.wise_ft,
    },
)
register = registry.register
create = registry.build
names = registry.names

__all__ = [
    "MixMethod",
    "MixPlan",
    "MixedSource",
    "Rule",
    "create",
    "dare",
    "ema",
    "greedy_soup",
    "lerp",
    "linear",
    "names",
    "parse_rules",
    "register",
    "registry",
    "slerp",
    "task_arithmetic",
    "ties",
    "uniform_soup",
    "update_in_place",
    "wise_ft",
]
