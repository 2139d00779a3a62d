"""Give one object a subclass of its own class, and take it back exactly.

Special methods such as `__call__` are looked up on the type, so wrapping the call of one
pipeline or denoiser (and of no other) means changing the type of that one object. The
subclass carries the original's name and module, so saving and class-name look-ups see no
difference; copies and pickles come out with the original class.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from ..errors import AttnctlWarning

__all__ = ["Uncopied", "adopt", "original_class", "release"]


class Uncopied:
    """Base of what we hang on patched objects: copies and pickles of those hold None."""

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class _Adopted:
    """First base of every subclass made here."""

    _attnctl_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        mine = type(self)
        swap = tuple(mine._attnctl_class if a is mine else a for a in reduced[1])
        make = mine._attnctl_class if reduced[0] is mine else reduced[0]
        return (make, swap, *reduced[2:])


@functools.cache
def _subclass(cls: type, mixin: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body: dict[str, Any] = {**names, "__doc__": cls.__doc__, "_attnctl_class": cls}
    for name, wrapper in vars(mixin).items():
        if callable(wrapper) and hasattr(cls, name):
            # same signature and docstring as the original, for code that inspects them
            body[name] = functools.wraps(getattr(cls, name))(_forwarding(wrapper))
        elif callable(wrapper):
            body[name] = property(_absent)
    return type(cls)(cls.__name__, (_Adopted, mixin, cls), body)


def _forwarding(wrapper: Any) -> Any:
    return lambda self, *args, **kwargs: wrapper(self, *args, **kwargs)


def _absent(self: Any) -> Any:
    """A method that the original class lacks stays unknown."""
    raise AttributeError(f"{type(self).__name__} has no such attribute")


def original_class(obj: Any) -> type:
    """Return the class of an object as it is without our subclass."""
    cls = type(obj)
    return cls._attnctl_class if issubclass(cls, _Adopted) else cls


def adopt(obj: Any, mixin: type) -> None:
    """Put `mixin` in front of the object's class; doing it twice changes nothing."""
    if not issubclass(type(obj), _Adopted):
        object.__setattr__(obj, "__class__", _subclass(type(obj), mixin))


def release(obj: Any) -> None:
    """Give the object its own class back.

    Warns (AttnctlWarning) and leaves it if somebody else changed the class in between.
    """
    cls = type(obj)
    if cls.__mro__[1:2] == (_Adopted,):
        object.__setattr__(obj, "__class__", cls._attnctl_class)  # type: ignore[attr-defined]
    elif issubclass(cls, _Adopted):
        warnings.warn(
            f"the class of this {cls.__name__} was changed after the patch; it is left as it is",
            AttnctlWarning,
            stacklevel=3,
        )
