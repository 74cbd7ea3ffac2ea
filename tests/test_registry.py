from __future__ import annotations

import sys
import types
from typing import Literal

import pytest
from pydantic import ValidationError

import sphinxkit.registry as module
from sphinxkit.errors import RegistryError
from sphinxkit.registry import ENTRY_POINT_GROUP, Registry, suggest


class Box:
    """A component with options of several kinds."""

    def __init__(
        self,
        in_dim: int,
        size: int = 3,
        shape: tuple[int, int] | None = None,
        mode: Literal["open", "shut"] = "open",
    ) -> None:
        self.options = (in_dim, size, shape, mode)


def open_box(width: int = 1, **extra: int) -> tuple[int, dict[str, int]]:
    return width, extra


@pytest.fixture
def boxes() -> Registry[object]:
    return Registry("box", {"plain": Box, "open": open_box})


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch):
    """Sets the entry points that are installed; nothing is remembered from or for other tests."""
    monkeypatch.setattr(module, "_plugins", module._Plugins())
    loads: list[str] = []

    class Point:
        def __init__(self, name, load) -> None:
            self.name, self._load = name, load

        def load(self):
            loads.append(self.name)
            return self._load()

    def install(**points):
        def entry_points(*, group: str):
            assert group == ENTRY_POINT_GROUP == "sphinxkit.plugins"
            return [Point(name, load) for name, load in points.items()]

        monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
        return loads

    install()
    return install


def test_decorator_registers_and_returns_the_builder(boxes: Registry[object], plugins) -> None:
    @boxes.register("mine")
    def mine(depth: int = 2) -> int:
        return depth * 10

    assert mine() == 20
    assert boxes.get("mine") is mine
    assert boxes.build("mine", depth=3) == 30
    assert boxes.names() == ["mine", "open", "plain"]


def test_a_taken_name_is_refused(boxes: Registry[object]) -> None:
    with pytest.raises(RegistryError, match=r"box 'plain' is already registered by <class .*Box'>"):
        boxes.register("plain")(open_box)
    assert boxes.get("plain") is Box


def test_build_passes_options(boxes: Registry[object]) -> None:
    box = boxes.build("plain", in_dim=4, shape=(2, 2))
    assert isinstance(box, Box)
    assert box.options == (4, 3, (2, 2), "open")
    assert boxes.build("open", width=2, anything=5) == (2, {"anything": 5})


def test_the_given_builders_are_not_shared(plugins) -> None:
    builders = {"plain": Box}
    Registry("box", builders).register("other")(open_box)
    assert list(builders) == ["plain"]
    assert Registry[object]("empty").names() == []


def test_unknown_names_list_the_known_and_suggest(boxes: Registry[object], plugins) -> None:
    with pytest.raises(RegistryError, match=r"unknown box 'plane'; did you mean 'plain'\? Known: open, plain$"):
        boxes.get("plane")
    with pytest.raises(RegistryError, match=r"^unknown box 'zzzzz'\. Known: open, plain$"):
        boxes.build("zzzzz")
    with pytest.raises(LookupError):
        boxes.options_model("plane")
    with pytest.raises(RegistryError, match="the name of a box is text, got None"):
        boxes.get(None)


def test_unknown_and_missing_options(boxes: Registry[object]) -> None:
    with pytest.raises(
        RegistryError, match=r"box 'plain': got an unexpected .*'sise'; did you mean 'size'\? Signature"
    ):
        boxes.build("plain", in_dim=1, sise=2)
    with pytest.raises(RegistryError, match=r"box 'plain': missing a required argument: 'in_dim'"):
        boxes.build("plain")


def test_errors_inside_a_builder_are_its_own(boxes: Registry[object]) -> None:
    @boxes.register("broken")
    def broken() -> None:
        raise TypeError("from inside")

    with pytest.raises(TypeError, match=r"^from inside$"):
        boxes.build("broken")


def test_module_and_builder(boxes: Registry[object], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = types.ModuleType("somebody_else")
    mine.make = open_box  # type: ignore[attr-defined]
    mine.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody_else", mine)
    assert boxes.get("somebody_else:make") is open_box
    assert boxes.build("somebody_else:make", width=9) == (9, {})
    assert boxes.options_model("somebody_else:make").model_fields["width"].default == 1
    with pytest.raises(RegistryError, match=r"box 'somebody_else:mak' cannot be imported: .*'mak'"):
        boxes.get("somebody_else:mak")
    with pytest.raises(
        RegistryError, match="box 'no_such_module_at_all:make' cannot be imported: ModuleNotFoundError: No module named"
    ):
        boxes.get("no_such_module_at_all:make")
    with pytest.raises(RegistryError, match="box ':make' cannot be imported: ValueError: Empty module name"):
        boxes.get(":make")
    with pytest.raises(RegistryError, match="box 'somebody_else:number' is int, not a callable"):
        boxes.get("somebody_else:number")


def test_entry_points_are_loaded_once_when_a_name_is_missed(boxes: Registry[object], plugins) -> None:
    loads = plugins(third_party=lambda: boxes.register("theirs")(open_box))
    assert boxes.get("plain") is Box
    assert loads == []
    assert boxes.build("theirs", width=3) == (3, {})
    assert boxes.names() == ["open", "plain", "theirs"]
    assert boxes.names() == ["open", "plain", "theirs"]
    assert loads == ["third_party"]


def test_a_plugin_that_fails_warns_and_is_named_later(boxes: Registry[object], plugins) -> None:
    def fail() -> None:
        raise ImportError("needs a package that is not here")

    plugins(broken=fail, good=lambda: boxes.register("theirs")(open_box))
    with pytest.warns(RuntimeWarning, match="plug-in 'broken' failed to load: needs a package that is not here"):
        assert boxes.names() == ["open", "plain", "theirs"]
    with pytest.raises(RegistryError, match=r"Plug-ins that failed to load: broken \(ImportError: needs a package"):
        boxes.get("unheard_of")


def test_a_plugin_cannot_take_a_name(boxes: Registry[object], plugins) -> None:
    plugins(greedy=lambda: boxes.register("plain")(open_box))
    with pytest.warns(RuntimeWarning, match="'greedy' failed to load: box 'plain' is already registered"):
        boxes.names()
    assert boxes.get("plain") is Box


def test_options_model_follows_the_signature(boxes: Registry[object]) -> None:
    options = boxes.options_model("plain", wired=("in_dim",))
    assert set(options.model_fields) == {"size", "shape", "mode"}
    parsed = options.model_validate_json('{"shape": [2, 4], "mode": "shut"}', strict=True)
    assert parsed.model_dump() == {"size": 3, "shape": (2, 4), "mode": "shut"}
    assert boxes.options_model("plain").model_fields["in_dim"].is_required()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"in_dim": 3}', "in_dim\n  Extra inputs are not permitted"),
        ('{"colour": 3}', "colour\n  Extra inputs are not permitted"),
        ('{"size": "3"}', "size\n  Input should be a valid integer"),
        ('{"size": 3.5}', "size\n  Input should be a valid integer"),
        ('{"shape": [1]}', "shape.1\n  Field required"),
        ('{"mode": "ajar"}', "mode\n  Input should be 'open' or 'shut'"),
    ],
)
def test_options_model_refuses(boxes: Registry[object], text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        boxes.options_model("plain", wired=("in_dim",)).model_validate_json(text, strict=True)


def test_options_model_keeps_further_options_of_open_builders(boxes: Registry[object]) -> None:
    parsed = boxes.options_model("open").model_validate_json('{"anything": 4}', strict=True)
    assert parsed.model_dump() == {"width": 1, "anything": 4}


def test_options_model_without_annotations(boxes: Registry[object]) -> None:
    boxes.register("bare")(lambda size=2: size)
    assert boxes.options_model("bare").model_validate({"size": "any"}).model_dump() == {"size": "any"}


def test_suggest() -> None:
    assert suggest("clip_vit_larg", ["clip_vit_large_patch14", "timm"]) == "; did you mean 'clip_vit_large_patch14'?"
    assert suggest("xyz", ["clip", "timm"]) == ""
    assert suggest("visio", ["vision", "visions"], {"visio": 1}) == "; did you mean 'vision'?"
    assert suggest("visio", ["vision", "visions"], {"visio": 1, "vision": {}}) == ""


def test_an_option_that_is_given_is_not_proposed(boxes: Registry[object]) -> None:
    with pytest.raises(RegistryError, match=r"'sise'\. Signature"):
        boxes.build("plain", in_dim=1, size=1, sise=2)
