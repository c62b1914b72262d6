"""What the JSON files of a transformers model ask for, wherever in them it is nested."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CODE: Final = {"auto_map", "custom_pipelines"}
_ATTENTION: Final = {"attn_implementation", "_attn_implementation"}
# transformers would read weights from another file than is looked at; compute in another type than was set; fetch
# kernels, which are code, from the hub, if the package for that is there.
_ELSEWHERE: Final = {"transformers_weights", "quantization_config", *_ATTENTION}
_OWN_ATTENTION: Final = {"eager", "sdpa"}


def code_names(described: Mapping[str, Any]) -> str:
    """The Python code that a file asks for; empty for none."""
    return ", ".join(str(value) for name, value in _leaves(described) if name in _CODE)


def asks_elsewhere(config: Mapping[str, Any]) -> tuple[str, object] | None:
    """The first thing in a configuration that would have more read, or run, than the folder's plain weights."""
    for name, value in _leaves(config):
        own = name in _ATTENTION and isinstance(value, str) and value in _OWN_ATTENTION
        if name in _ELSEWHERE and value is not None and not own:
            return name, value
    return None


def numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number, with its name."""
    for name, value in _leaves(config):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _leaves(described: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every value with its name, in order; what is asked for stays whole. Nesting of any depth is no matter."""
    waiting: list[tuple[str, object]] = [("", described)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and name not in _CODE | _ELSEWHERE:
            waiting += reversed(value.items())
        elif isinstance(value, list):
            waiting += [(name, part) for part in reversed(value)]
        else:
            yield name, value
