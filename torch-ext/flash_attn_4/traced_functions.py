"""The caller's functions where torch.compile traces a call: its guards tell them apart.

Dynamo guards the code of a function and not what it captured, for it expects to trace into it. Here
a function goes into the graph as a constant (`functions.handle`), so that what it does must be
guarded. (PyTorch's flex_attention traces its score_mod into the graph instead; ours is called by
the cpu variant, and compiled by CuTe DSL for GPUs, as the Python function that it is.)

    a function         by its code, if all that it captured and its defaults are plain values, by
                       these: layers whose closures have equal ones share a graph
                       else by identity
    functools.partial  by its function and arguments, each as here
    bound method       by its function and its object
    other objects      by identity
    made in the graph  (closures too) by what it captured, each as here

By identity means that the graph calls that very object, whose state may change. Graphs that hold a
function hold it for as long as they live. This reads what Dynamo knows of a variable, for which
there is no public interface; `comptime` is Dynamo's way in.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource
from torch._dynamo.variables import (
    FunctoolsPartialVariable,
    NestedUserFunctionVariable,
    SymNodeVariable,
    UserFunctionVariable,
    UserMethodVariable,
)

from .flash_attn4_cute.checks import refuse
from .functions import number_of

_CONSTANT_TYPES = frozenset({int, float, bool, str, type(None), torch.dtype})
_UNKNOWN = object()
# Equal copies are one, so that a graph that is compiled anew does not compile kernels anew.
_copies: WeakValueDictionary[tuple, Callable] = WeakValueDictionary()


def settle(context: Any, name: str) -> int:
    """The number of the function that the traced local `name` stands for.

    It is guarded, and held by the graph. What cannot be compiled breaks the graph.
    """
    tx = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    try:
        function = _value(tx, local)
        number = number_of(function)
    except (AttributeError, NotImplementedError, TypeError) as problem:
        raise Unsupported(str(problem)) from problem
    tx.output.install_global_by_id("_flash_attn_4_function", function)
    return number


def _value(tx: Any, variable: Any) -> Any:
    """What `variable` stands for, guarded."""
    variable = variable.realize()
    source = variable.source
    if isinstance(variable, UserMethodVariable):
        function = _function(variable.fn, source and AttrSource(source, "__func__"))
        return _one_of(types.MethodType, (function, _value(tx, variable.obj)), {})
    if isinstance(variable, FunctoolsPartialVariable):
        args = [_value(tx, x) for x in (variable.func, *variable.args)]
        keywords = {name: _value(tx, x) for name, x in variable.keywords.items()}
        return _one_of(functools.partial, args, keywords)
    if isinstance(variable, NestedUserFunctionVariable):
        return _made(tx, variable)
    if isinstance(variable, UserFunctionVariable):
        return _function(variable.fn, source)
    if isinstance(variable, SymNodeVariable):
        return variable.evaluate_expr()  # a number that was dynamic becomes a constant
    found = getattr(variable, "value", getattr(variable, "fn", _UNKNOWN))
    if type(found) in _CONSTANT_TYPES:
        return found
    if found is not _UNKNOWN and source is not None:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        return found
    raise refuse(
        NotImplementedError,
        "score_mod or mask_mod",
        variable.python_type().__name__,
        "what a function that is made in a compiled one captures must be plain values, or "
        "functions and objects from outside",
        "Pass tensors as aux_tensors, or make the function outside of the compiled one",
    )


def _function(function: Any, source: Any) -> Callable:
    """A function that the graph did not make."""
    if source is None:
        return function
    closure = function.__closure__ or ()
    defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    try:
        contents = [cell.cell_contents for cell in closure]
    except ValueError:  # not assigned yet
        contents = [None, closure]
    if not _CONSTANT_TYPES.issuperset(map(type, (*contents, *defaults, *keywords.values()))):
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        return function
    install_guard(source.make_guard(GuardBuilder.CLOSURE_MATCH))
    for name, values in (("__closure__", contents), ("__defaults__", defaults)):
        for i in range(len(values)):
            item: Any = GetItemSource(AttrSource(source, name), i)
            item = AttrSource(item, "cell_contents") if name == "__closure__" else item
            install_guard(item.make_guard(GuardBuilder.CONSTANT_MATCH))
    for name in keywords:
        item = DictGetItemSource(AttrSource(source, "__kwdefaults__"), name)
        install_guard(item.make_guard(GuardBuilder.CONSTANT_MATCH))
    if not (contents or defaults or keywords):
        return function
    # Of the functions with these values any may be changed: the graph needs one that is not.
    return _copy(function.__code__, function.__globals__, contents, defaults, keywords)


def _made(tx: Any, variable: Any) -> Callable:
    """A function that the graph makes."""
    cells = variable.closure.items if variable.closure else ()
    contents = [_value(tx, tx.output.side_effects.load_cell(cell)) for cell in cells]
    defaults = [_value(tx, x) for x in variable.defaults.items] if variable.defaults else []
    named = variable.kwdefaults.items if variable.kwdefaults else {}
    keywords = {name.vt.as_python_constant(): _value(tx, x) for name, x in named.items()}
    code = variable.code.as_python_constant()
    return _copy(code, variable.f_globals, contents, defaults, keywords)


def _copy(
    code: types.CodeType,
    variables: dict[str, Any],
    contents: Sequence[Any],
    defaults: Sequence[Any],
    keywords: dict[str, Any],
) -> Callable:
    """A function of its own with these `variables` as its globals."""

    def make(*values: Any, **keywords: Any) -> Callable:
        cells = tuple(map(types.CellType, values[: len(contents)]))
        rest = values[len(contents) :]
        function = types.FunctionType(code, variables, code.co_name, rest, cells)
        function.__kwdefaults__ = keywords
        return function

    return _one_of(make, (*contents, *defaults), keywords, told_by=(id(code), id(variables)))


def _one_of(
    make: Callable[..., Callable],
    values: Sequence[Any],
    keywords: dict[str, Any],
    *,
    told_by: Any = None,
) -> Callable:
    """What `make` made before of the same values; it must keep alive what is told by its id."""
    told = [
        (type(x), x if type(x) in _CONSTANT_TYPES else id(x)) for x in (*values, *keywords.values())
    ]
    key = (told_by or make, *keywords, *told)
    found = _copies.get(key)
    if found is None:
        found = _copies[key] = make(*values, **keywords)
    return found
