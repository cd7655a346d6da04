"""Second views of an object: another class over the same attributes.

A drop-in must be everything that the original is: pass `isinstance`, save under the original's name, show attributes
set on it later. So it is an instance of a subclass of the original's class that shares the original's `__dict__`; the
original is not touched, and what the subclass adds lives in a slot outside that dict.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def second_view(original: T, mixin: type, added: object) -> T:
    """An object of a new subclass `(mixin, type(original))` with the name of the original's class.

    Args:
        original: any object with a `__dict__`.
        mixin: a class with `__slots__ = ()`; its methods come before the original's.
        added: kept in the slot `_lightcache`.
    """
    cls = type(original)
    namespace: dict[str, Any] = {
        "__slots__": ("_lightcache",),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: Any = type(cls)
    view: Any = object.__new__(metaclass(cls.__name__, (mixin, cls), namespace))
    object.__setattr__(view, "__dict__", original.__dict__)
    object.__setattr__(view, "_lightcache", added)
    result: T = view
    return result
