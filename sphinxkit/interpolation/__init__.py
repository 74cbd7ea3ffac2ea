"""Weight mixing: merge methods as pure functions of tensors, rules by name, and lazy mixes of whole models."""

from sphinxkit.interpolation.method import MixMethod, register, registry
from sphinxkit.interpolation.methods.dare import dare
from sphinxkit.interpolation.methods.linear import ema, lerp, linear, wise_ft
from sphinxkit.interpolation.methods.slerp import slerp
from sphinxkit.interpolation.methods.soup import greedy_soup, uniform_soup
from sphinxkit.interpolation.methods.task_arithmetic import task_arithmetic
from sphinxkit.interpolation.methods.ties import ties
from sphinxkit.interpolation.plan import MixPlan
from sphinxkit.interpolation.rules import Rule, parse_rules
from sphinxkit.interpolation.stream import MixedSource, update_in_place

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
