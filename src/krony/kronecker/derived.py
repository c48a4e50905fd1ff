"""Tensors derived from parameters: made in every forward pass, and reused only while one key-value cache is continued.

Nothing tells reliably whether a parameter has changed: fused optimisers and assignments through ``.data`` leave its
version as it is. A key-value cache that holds tokens can tell: it is itself derived from the weights, so whoever
continues it asserts that the weights are the same. Derived tensors therefore live exactly as long as the cache they
were made with: in ``generate`` they are made once, by the prefill, and reused for every new token. A forward pass
without a cache, with gradients or in training mode makes its own and stores nothing.

``reuse_while_decoding`` registers two hooks on the body of a model: the module whose forward takes the cache. The first
opens the *scope* of that cache for the current thread, the second closes it; ``derived`` asks for the open scope.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")
States = tuple[Any, ...]  # addresses, versions and dtypes of parameters


def derived(layers: tuple[nn.Module, ...], name: str, make: Callable[[], Value]) -> Value:
    """What ``make`` returns: from the open scope if it was made there from the same parameters, else made now.

    Args:
        layers: the layers whose parameters ``make`` reads; the value belongs to the last one.
        name: tells the values of one layer apart.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> derived((layer,), "transposed", lambda: layer.weight.T).shape  # no scope is open: made now, not stored
        torch.Size([2, 2])
    """
    scope = _open_scope()
    return make() if scope is None else scope.get(layers, name, make)


def is_reusing() -> bool:
    """Whether derived tensors are reused from call to call: a scope is open in this thread."""
    return _open_scope() is not None


def reuse_while_decoding(body: nn.Module) -> None:
    """Lets the layers in ``body`` reuse derived tensors while one key-value cache is continued.

    Args:
        body: the module whose forward takes the cache, as ``cache``, ``past_key_values`` or a positional argument.
            Calling this again changes nothing.
    """
    if _enter not in body._forward_pre_hooks.values():
        body.register_forward_pre_hook(_enter, with_kwargs=True)
        body.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def stop_reusing(body: nn.Module) -> None:
    """Removes what ``reuse_while_decoding`` registered; a copy of a model has no handles of its hooks."""
    for hooks, own in ((body._forward_pre_hooks, _enter), (body._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for options in (
                body._forward_pre_hooks_with_kwargs,
                body._forward_hooks_with_kwargs,
                body._forward_hooks_always_called,
            ):
                options.pop(key, None)
    _scopes.pop(body, None)


class Scope:
    """The derived tensors of one body for one key-value cache.

    The parameters' addresses, versions and dtypes are a second line of defence: a change in place in the middle of
    a generation, such as test-time training by ``copy_``, is seen as well.
    """

    def __init__(self, body: nn.Module) -> None:
        self._members = frozenset(map(id, body.modules()))
        self._values: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[States, Any]]] = weakref.WeakKeyDictionary()
        self._length: Any = 0  # of the cache when the body left it
        self._keys: tuple[StorageWeakRef, int | None] | None = None

    def get(self, layers: tuple[nn.Module, ...], name: str, make: Callable[[], Value]) -> Value:
        """As ``derived``; a layer of another model, of which the cache says nothing, has its value made now."""
        holder = layers[-1]
        states = _states(layers)
        if states is None or id(holder) not in self._members or is_sharded(holder):
            return make()
        values = self._values.get(holder)
        if values is None:
            values = self._values[holder] = {}
        found = values.get(name)
        if found is None or found[0] != states:
            found = values[name] = states, make()
        return found[1]

    def remember(self, cache: Any) -> None:
        """Notes how the body leaves its cache."""
        self._length, self._keys = _length_of(cache), _keys_of(cache)

    def is_continued_by(self, cache: Any) -> bool:
        """Whether the cache holds tokens and is as the body left it, but for tokens dropped or sequences reordered.

        A cache that was reset may have been filled again by another model, or by this one in a compiled graph.
        """
        length, keys = _length_of(cache), _keys_of(cache)
        if not length > 0:
            return False
        if keys is not None and self._keys is not None and keys[0] == self._keys[0]:  # dropping tokens makes a view
            return keys[1] == self._keys[1]
        return length is self._length or length == self._length  # reordering copies


_scopes: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Any, Scope]] = weakref.WeakKeyDictionary()
_thread = threading.local()  # .running: the bodies whose forward is running, the innermost last, with their scopes


def _nothing() -> None:
    return None


def _open_scope() -> Scope | None:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    running = getattr(_thread, "running", None)
    return running[-1][1]() if running else None


def _running() -> list[tuple[Callable[[], nn.Module | None], Callable[[], Scope | None]]]:
    if not hasattr(_thread, "running"):
        _thread.running = []
    return _thread.running


def _enter(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The forward pre-hook of a body: opens the scope of the cache it was given, or none."""
    if torch.compiler.is_compiling():
        return
    running = _running()
    for index, (each, _) in enumerate(running):
        if each() is body:  # hooks are not called after Ctrl-C: a forward that it stopped is still listed
            del running[index:]
            break
    scope = _scope_for(body, args, kwargs)
    running.append((weakref.ref(body), _nothing if scope is None else weakref.ref(scope)))


def _leave(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
    """The forward hook of a body, called after exceptions as well: closes its scope."""
    if torch.compiler.is_compiling():
        return
    running = _running()
    if running and running[-1][0]() is body:
        scope = running.pop()[1]()
        if scope is not None:
            scope.remember(_cache_in(args, kwargs))


def _scope_for(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope | None:
    if body.training or torch.is_grad_enabled():
        _scopes.pop(body, None)  # a step of an optimiser may follow, even in the middle of a generation
        return None
    cache = _cache_in(args, kwargs)
    if cache is None or is_capturing() or is_sharded(body):
        return None
    scopes = _scopes.setdefault(body, weakref.WeakKeyDictionary())
    scope = scopes.get(cache)
    if scope is None or not scope.is_continued_by(cache):
        scope = scopes[cache] = Scope(body)
    return scope


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers the module's parameters for its forward: nothing may be kept that shares their memory.

    It frees that memory afterwards, and what is gathered next may have the same address and version.
    """
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: it would replay stored tensors after they were freed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The key-value cache among the arguments of a body, a ``Cache`` of transformers, or None."""
    for value in (kwargs.get("cache"), kwargs.get("past_key_values"), *args):
        if hasattr(type(value), "get_seq_length"):
            return value
    return None


def _length_of(cache: Any) -> Any:
    """The number of tokens in a cache, on some devices a tensor; 0 where none are counted (linear attention)."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0


def _keys_of(cache: Any) -> tuple[StorageWeakRef, int | None] | None:
    """Memory and version of the keys of the first layer that has any; inference tensors have no version."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            try:
                return StorageWeakRef(keys.untyped_storage()), None if keys.is_inference() else keys._version
            except RuntimeError:  # functional tensors have no memory of their own
                return None
    return None


def _states(layers: tuple[nn.Module, ...]) -> States | None:
    """Tells one state of the parameters from another as far as tensors can; None for tensors that can't at all."""
    states: list[Any] = []
    device = "cpu"
    try:
        for layer in layers:
            for parameter in layer._parameters.values():
                if parameter is not None:
                    states.append((parameter.data_ptr(), parameter._version, parameter.dtype))
                    device = parameter.device.type
    except RuntimeError:  # inference tensors have no version, functional ones no address
        return None
    if not states:  # the parameters are elsewhere, as in FSDP's first version
        return None
    states.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return tuple(states)
