"""Give one object a subclass of its own class, and take it back exactly.

Special methods such as `__call__` are looked up on the type, so wrapping the call of one
pipeline, denoiser or attention module (and of no other) means changing the type of that one
object. The subclass carries the original's name and module, so saving and class-name look-ups
see no difference; copies, pickles and objects made by the subclass have the original class.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import AttnctlWarning

__all__ = ["PREFIX", "Adopted", "Front", "Uncopied", "adopt", "original_class", "release"]

PREFIX = "_attnctl"
"""Begins the name of every attribute that we put on somebody else's object."""

_HOLDS = PREFIX + "_holds"
_LOCK = threading.RLock()


class Uncopied:
    """Base of what we hang on patched objects: copies and pickles of those hold None."""

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class Front:
    """A mixin's method that is made for each class from the class's own, as a decorator.

    It saves the calls in between, for methods that a model calls all the time. The method that is
    made must also serve objects that have been released, as the stock one does.

    Args:
        make: returns the method, given the class's own function.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make


class Adopted:
    """First base of every subclass made here."""

    _attnctl_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to the original class, with nothing of ours in the state."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        mine, stock = type(self), self._attnctl_class
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle insists that this one gets the object's present class
            make, args = copyreg._reconstructor, (stock, object, None)  # type: ignore[attr-defined]
        args = tuple(stock if a is mine else a for a in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {k: v for k, v in rest[0].items() if not k.startswith(PREFIX)}
        return (stock if make is mine else make, args, *rest)


@functools.cache
def _metaclass(meta: Any) -> Any:
    """A metaclass whose classes make objects of the original class, and compare equal to it.

    `type(pipe)(...)` is common in user code, and from_pipe asks whether
    `type(denoiser) in (...)`. The hash stays one of identity: caches and registries keyed by
    class go on telling the two apart.
    """
    body = {
        "__call__": lambda cls, *args, **kwargs: meta.__call__(_stock(cls), *args, **kwargs),
        "__eq__": lambda cls, other: _stock(cls) is _stock(other),
        "__hash__": meta.__hash__,
    }
    return type(meta)(meta.__name__, (meta,), body)


def _stock(cls: Any) -> Any:
    return vars(cls).get("_attnctl_class", cls) if isinstance(cls, type) else cls


@functools.cache
def _subclass(cls: Any, mixin: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body: dict[str, Any] = {**names, "__doc__": cls.__doc__, "_attnctl_class": cls}
    for name, wrapper in vars(mixin).items():
        if isinstance(wrapper, (types.FunctionType, Front)):
            stock = getattr(cls, name, None)
            body[name] = property(_absent) if stock is None else _front(stock, wrapper)
    meta: Any = type(cls)
    return _metaclass(meta)(cls.__name__, (Adopted, mixin, cls), body)


def _front(stock: Any, wrapper: Any) -> Any:
    """Return the wrapper with the signature and docstring of what it wraps."""
    make = wrapper.make if isinstance(wrapper, Front) else functools.partial(_guarded, wrapper)
    made = make(stock)
    functools.update_wrapper(made, stock)
    # torch.compile counts recompilations by code object: each class needs its own
    made.__code__ = made.__code__.replace()
    return made


def _guarded(wrapper: Any, stock: Any) -> Any:
    """Return the wrapper for objects that are patched, else the stock method."""

    def front(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Adopted):
            return wrapper(self, *args, **kwargs)
        # a bound method that torch.compile took under the patch, called after the undo
        return stock(self, *args, **kwargs)

    return front


def _absent(self: Any) -> Any:
    """A method that the original class lacks stays unknown."""
    raise AttributeError(f"{type(self).__name__} has no such attribute")


def original_class(obj: Any) -> type:
    """Return the class of an object as it is without our subclass."""
    return _stock(type(obj))


def adopt(obj: Any, mixin: type) -> None:
    """Put `mixin` in front of the object's class; counted, each needs one `release`."""
    with _LOCK:
        if not issubclass(type(obj), Adopted):
            cls: Any = type(obj)
            object.__setattr__(obj, "__class__", _subclass(cls, mixin))
        obj.__dict__[_HOLDS] = obj.__dict__.get(_HOLDS, 0) + 1


def release(obj: Any) -> None:
    """Undo one `adopt`; the last one gives the object its own class back.

    Warns (AttnctlWarning) and leaves the class if somebody else changed it in between.
    """
    with _LOCK:
        holds = obj.__dict__.pop(_HOLDS, 0) - 1
        if holds > 0:
            obj.__dict__[_HOLDS] = holds
            return
        cls = type(obj)
        if _stock(cls) is not cls:
            object.__setattr__(obj, "__class__", _stock(cls))
        elif issubclass(cls, Adopted):
            warnings.warn(
                f"the class of this {cls.__name__} was changed after the patch; it is left as "
                "it is",
                AttnctlWarning,
                stacklevel=3,
            )
