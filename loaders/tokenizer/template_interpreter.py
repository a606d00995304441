"""Interpreter of chat templates: renders the syntax tree that jinja2 parses, with a bounded number of steps.

It covers the part of Jinja that published templates use, and renders it as jinja2 does. Everything else, such as
`{% include %}`, `**` or an unknown filter, is an error where a template reaches it. No Python code is generated, and
nothing of a Python object can be reached but what `template_values` and `template_filters` list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.runtime import LoopContext

from .template_budget import Budget
from .template_filters import called_filter, compared, formatted, functions, tested
from .template_values import Function, Namespace, attribute, elements, growth, hashed, item, unavailable

_ABSENT = ("lipsum", "self", "varargs", "kwargs")
"""Variables that jinja2 defines, in all of a template or in a macro, and that the interpreter does not have."""

_OF_MACROS = ("catch_kwargs", "catch_varargs", "caller", "explicit_caller")  # attributes that jinja2's macros have
_STEPS_OF_A_MACRO = 50  # a macro keeps its scope alive: some 600 bytes for each one that a loop makes


class Scope:
    """Variables of a block, within those of the blocks around it."""

    __slots__ = ("names", "outer")

    def __init__(self, names: dict[str, Any], outer: Scope | None = None):
        self.names, self.outer = names, outer

    def get(self, name: str) -> Any:
        """Return a variable; an undefined value if there is none."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        if name in _ABSENT:
            raise unavailable("variable", name)
        return Undefined(name=name)


class _Break(Exception):
    """Ends a loop: `{% break %}`."""


class _Continue(Exception):
    """Ends a turn of a loop: `{% continue %}`."""


class Interpreter:
    """Renders one template once.

    budget  what it may use
    line    the line of the template that it is at, for errors
    """

    def __init__(self, budget: Budget):
        self.budget, self.line = budget, 1

    def render(self, template: nodes.Template, variables: dict[str, Any]) -> str:
        """Return the text of a template.

        Raises:
          TooExpensive: if the template exceeds its budget.
          Exception: what the template itself raises.
        """
        scope = Scope({}, Scope(variables, Scope(functions(self.budget))))
        try:
            return self._text(template.body, scope)
        except (_Break, _Continue) as error:
            raise TemplateRuntimeError("break or continue outside of a loop") from error

    def _text(self, body: Sequence[nodes.Node], scope: Scope) -> str:
        parts: list[str] = []
        self._run(body, scope, parts)
        return "".join(parts)

    # Statements.

    def _run(self, body: Sequence[nodes.Node], scope: Scope, out: list[str]) -> None:
        """Run statements, and append what they print to `out`."""
        for node in body:
            self.budget.step()
            self.line = node.lineno
            statement = _STATEMENTS.get(type(node))
            if statement is None:
                raise unavailable("statement", type(node).__name__.lower())
            statement(self, node, scope, out)

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for part in node.nodes:
            text = part.data if isinstance(part, nodes.TemplateData) else self.budget.text(self._value(part, scope))
            self.budget.step()
            self.budget.write(len(text))
            out.append(text)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self._value(branch.test, scope):
                return self._run(branch.body, scope, out)
        return self._run(node.else_, scope, out)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        if node.recursive:
            raise unavailable("statement", "for … recursive")
        values = self._value(node.iter, scope)
        parts: Any = values if isinstance(values, (list, tuple, range)) else elements(self.budget, values)
        ran = False
        for value, loop in LoopContext(parts if node.test is None else self._tested(node, parts, scope), Undefined):
            ran = True
            self.budget.step()
            inner = Scope({"loop": loop}, scope)
            self._assign(node.target, value, inner)
            try:
                self._run(node.body, inner, out)
            except _Break:
                break
            except _Continue:
                continue
        if not ran:
            self._run(node.else_, Scope({}, scope), out)

    def _tested(self, node: nodes.For, parts: Any, scope: Scope) -> Iterator[Any]:
        """Return the elements for which the condition of `for … in … if …` holds."""
        assert node.test is not None
        for value in parts:
            self.budget.step()
            inner = Scope({}, scope)
            self._assign(node.target, value, inner)
            if self._value(node.test, inner):
                yield value

    def _set(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        value = self._value(node.node, scope)
        if isinstance(node.target, nodes.NSRef) and isinstance(node.node, (nodes.Add, nodes.Concat)):
            namespace = scope.get(node.target.name)
            if isinstance(namespace, Namespace) and isinstance(value, str):
                self.budget.refund(namespace.drop(node.target.attr))
        self._assign(node.target, value, scope)

    def _set_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        value: Any = self._text(node.body, Scope({}, scope))
        if node.filter is not None:
            value = self._chained(node.filter, value, scope)
        self._assign(node.target, value, scope)

    def _assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.names[target.name] = value
        elif isinstance(target, nodes.NSRef):
            namespace = scope.get(target.name)
            if not isinstance(namespace, Namespace):
                raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
            namespace.values[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            values = elements(self.budget, value)
            if len(values) != len(target.items):
                raise ValueError(f"expected {len(target.items)} values to unpack, found {len(values)}")
            for one, each in zip(target.items, values, strict=True):
                self._assign(one, each, scope)
        else:
            raise unavailable("target", type(target).__name__)

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = self._callable(node.name, node, scope)

    def _callable(self, name: str, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> Function:
        self.budget.step(_STEPS_OF_A_MACRO)
        names = [argument.name for argument in node.args]
        defaults = dict(zip(names[len(names) - len(node.defaults) :], node.defaults, strict=True))

        no_caller = Undefined("No caller defined", name="caller")

        def call(*given: Any, caller: Any = no_caller, **named: Any) -> str:
            if len(given) > len(names) or (extra := set(named) - set(names[len(given) :])):
                found = f"{len(given)}" if len(given) > len(names) else f"{sorted(extra)[0]!r}"
                raise TypeError(f"macro {name!r} takes the arguments {', '.join(names)}, found {found}")
            values = {**dict(zip(names, given, strict=False)), **named}
            inner = Scope({"caller": caller}, scope)
            for one in names:
                if one in values:
                    inner.names[one] = values[one]
                elif one in defaults:
                    inner.names[one] = self._value(defaults[one], inner)
                else:
                    inner.names[one] = Undefined(f"parameter {one!r} was not provided", name=one)
            return self._text(node.body, inner)

        return Function(name, call, {"name": name, "arguments": tuple(names)}, _OF_MACROS)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        text = self.budget.text(self._call(node.call, scope, caller=self._callable("caller", node, scope)))
        self.budget.write(len(text))
        out.append(text)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        text = self.budget.text(self._chained(node.filter, self._text(node.body, Scope({}, scope)), scope))
        self.budget.write(len(text))
        out.append(text)

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope({}, scope)
        for target, value in zip(node.targets, [self._value(one, scope) for one in node.values], strict=True):
            self._assign(target, value, inner)
        self._run(node.body, inner, out)

    def _scope(self, node: nodes.Scope, scope: Scope, out: list[str]) -> None:
        self._run(node.body, Scope({}, scope), out)

    def _break(self, node: nodes.Break, scope: Scope, out: list[str]) -> None:
        raise _Break

    def _continue(self, node: nodes.Continue, scope: Scope, out: list[str]) -> None:
        raise _Continue

    # Expressions.

    def _value(self, node: Any, scope: Scope) -> Any:
        """Return the value of an expression."""
        self.budget.step()
        self.line = node.lineno
        expression = _EXPRESSIONS.get(type(node))
        if expression is None:
            raise unavailable("operator", getattr(node, "operator", None) or type(node).__name__.lower())
        return expression(self, node, scope)

    def _const(self, node: nodes.Const, scope: Scope) -> Any:
        return self.budget.integer(node.value)

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        texts = [self.budget.text(self._value(one, scope)) for one in node.nodes]
        self.budget.check(sum(map(len, texts)))
        made = "".join(map(str, texts))
        self.budget.copy(made)
        return made

    def _condition(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self._value(node.test, scope):
            return self._value(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("the inline if-expression evaluated to false and no else section was defined.")
        return self._value(node.expr2, scope)

    def _dict(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        made = {}
        for pair in node.items:
            key = hashed(self._value(pair.key, scope))
            made[key] = self._value(pair.value, scope)
        return made

    def _item(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self._value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return item(self.budget, value, slice(*(one and self._value(one, scope) for one in bounds)))
        return item(self.budget, value, self._value(node.arg, scope))

    def _compare(self, node: nodes.Compare, scope: Scope) -> Any:
        left: Any = self._value(node.expr, scope)
        result = True
        for operand in node.ops:
            right = self._value(operand.expr, scope)
            result = compared(self.budget, operand.op, left, right)
            if not result:
                break
            left = right
        return result

    def _and(self, node: nodes.And, scope: Scope) -> Any:
        return self._value(node.left, scope) and self._value(node.right, scope)

    def _or(self, node: nodes.Or, scope: Scope) -> Any:
        return self._value(node.left, scope) or self._value(node.right, scope)

    def _call(self, node: nodes.Call, scope: Scope, **named: Any) -> Any:
        function = self._value(node.node, scope)
        given, named = self._arguments(node, scope, named)
        if isinstance(function, Undefined):
            return function(*given)  # raises its error
        if not isinstance(function, Function):
            raise SecurityError(f"{type(function).__name__} is not callable")
        return function.call(*given, **named)

    def _arguments(self, node: Any, scope: Scope, named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise unavailable("operator", "* or ** before an argument")
        given = [self._value(one, scope) for one in node.args]
        return given, {**{one.key: self._value(one.value, scope) for one in node.kwargs}, **named}

    def _filter(self, node: nodes.Filter, scope: Scope) -> Any:
        return self._filtered(node, self._value(node.node, scope), scope)

    def _filtered(self, node: nodes.Filter, value: Any, scope: Scope) -> Any:
        """Return the value of a filter of `value`."""
        given, named = self._arguments(node, scope, {})
        return called_filter(self.budget, node.name, value, *given, **named)

    def _chained(self, node: Any, text: str, scope: Scope) -> Any:
        """Return the value of a block's filters, such as `{% filter trim | upper %}`; the last one is `node`."""
        value = text if node.node is None else self._chained(node.node, text, scope)
        return self._filtered(node, value, scope)

    def _test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self._value(node.node, scope)
        given, named = self._arguments(node, scope, {})
        return tested(self.budget, node.name, value, *given, **named)

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self._value(node.left, scope), self._value(node.right, scope)
        if isinstance(node, nodes.Mul) and isinstance(left, int):
            left, right = right, left
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            return self.budget.integer(_ARITHMETIC[type(node)](left, right))
        if isinstance(left, str) and isinstance(node, nodes.Mod):
            return formatted(self.budget, left, right)
        if isinstance(left, str) and isinstance(right, str) and isinstance(node, nodes.Add):
            return self._joined(node, left, right)
        elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and isinstance(node, nodes.Add):
            self.budget.step(len(left) + len(right))
        elif isinstance(node, nodes.Mul) and isinstance(right, int) and isinstance(left, (str, list, tuple)):
            (self.budget.write if isinstance(left, str) else self.budget.step)(len(left) * max(right, 0))
        elif not (isinstance(left, Undefined) or isinstance(right, Undefined)):
            raise TypeError(f"cannot compute {type(left).__name__} {node.operator} {type(right).__name__}")
        return _ARITHMETIC[type(node)](left, right)

    def _joined(self, node: nodes.Add, left: str, right: str) -> str:
        """Return `left + right`; of `a + b + c`, what `a + b` took up is free again."""
        self.budget.check((len(left) + len(right)) * growth(left, right))
        made = left + right
        self.budget.copy(made)
        if isinstance(node.left, (nodes.Add, nodes.Concat)):
            self.budget.refund(len(left))
        return made


_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
    nodes.Div: operator.truediv,
    nodes.FloorDiv: operator.floordiv,
    nodes.Mod: operator.mod,
}

_STATEMENTS: dict[type, Callable[[Interpreter, Any, Scope, list[str]], None]] = {
    nodes.Output: Interpreter._output,
    nodes.If: Interpreter._if,
    nodes.For: Interpreter._for,
    nodes.Assign: Interpreter._set,
    nodes.AssignBlock: Interpreter._set_block,
    nodes.Macro: Interpreter._macro,
    nodes.CallBlock: Interpreter._call_block,
    nodes.FilterBlock: Interpreter._filter_block,
    nodes.With: Interpreter._with,
    nodes.Scope: Interpreter._scope,
    nodes.Break: Interpreter._break,
    nodes.Continue: Interpreter._continue,
}

_EXPRESSIONS: dict[type, Callable[[Interpreter, Any, Scope], Any]] = {
    nodes.Name: lambda self, node, scope: scope.get(node.name),
    nodes.Const: Interpreter._const,
    nodes.Concat: Interpreter._concat,
    nodes.CondExpr: Interpreter._condition,
    nodes.Dict: Interpreter._dict,
    nodes.List: lambda self, node, scope: [self._value(one, scope) for one in node.items],
    nodes.Tuple: lambda self, node, scope: tuple([self._value(one, scope) for one in node.items]),
    nodes.Getattr: lambda self, node, scope: attribute(self.budget, self._value(node.node, scope), node.attr),
    nodes.Getitem: Interpreter._item,
    nodes.Compare: Interpreter._compare,
    nodes.And: Interpreter._and,
    nodes.Or: Interpreter._or,
    nodes.Not: lambda self, node, scope: not self._value(node.node, scope),
    nodes.Neg: lambda self, node, scope: -self._value(node.node, scope),
    nodes.Pos: lambda self, node, scope: +self._value(node.node, scope),
    nodes.Call: Interpreter._call,
    nodes.Filter: Interpreter._filter,
    nodes.Test: Interpreter._test,
    **dict.fromkeys(_ARITHMETIC, Interpreter._binary),
}
