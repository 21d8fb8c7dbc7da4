"""Kernel signatures, and the function that calls a kernel with what a launch provides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .tokens import Tokens

# The order of `enum Builtin` in rt/runtime.h.
BUILTINS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "dispatch_threads_per_threadgroup",
    "thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "quadgroup_index_in_threadgroup",
    "thread_index_in_quadgroup",
)


class Parameter(NamedTuple):
    """One parameter: kind is buffer, threadgroup, builtin or unbound; slot is its index there."""

    kind: str
    slot: int
    text: str


class UnboundParameter(ValueError):
    """A kernel parameter has no attribute that Metal knows."""


def parameters(tokens: Tokens, opening: int, closing: int) -> list[Parameter]:
    """The parameters between the brackets at these indices."""
    found: list[Parameter] = []
    start, depth = opening + 1, 0
    for at in range(opening + 1, closing + 1):
        text = tokens[at].text
        if depth == 0 and (at == closing or text == ","):
            if piece := tokens.join(start, at):
                found.append(_parameter(piece))
            start = at + 1
        depth += {"(": 1, "[": 1, "[[": 1, "<": 1, ")": -1, "]": -1, "]]": -1, ">": -1}.get(text, 0)
    return _number_the_rest(found)


def _parameter(text: str) -> Parameter:
    attributes = ",".join(re.findall(r"\[\[(.*?)\]\]", text))
    if m := re.search(r"\bbuffer\s*\(\s*(\d+)\s*\)", attributes):
        return Parameter("buffer", int(m.group(1)), text)
    # `threadgroup` is a macro for __local by now, in attributes as well
    if m := re.search(r"\b(?:threadgroup|__local)\s*\(\s*(\d+)\s*\)", attributes):
        return Parameter("threadgroup", int(m.group(1)), text)
    for index, name in enumerate(BUILTINS):
        if re.search(rf"\b{name}\b", attributes):
            return Parameter("builtin", index, text)
    return Parameter("unbound", 0, text)


def _number_the_rest(found: list[Parameter]) -> list[Parameter]:
    """Metal gives pointers and references without an attribute the next free buffer index."""
    taken = {p.slot for p in found if p.kind == "buffer"}
    for i, p in enumerate(found):
        if p.kind == "unbound" and re.search(r"\b(__global|constant)\b.*[*&]", p.text):
            index = min(set(range(len(found) + len(taken) + 1)) - taken)
            taken.add(index)
            found[i] = p._replace(kind="buffer", slot=index)
    return found


# Types come from the kernel itself, so nothing here parses a type.
SIGNATURE = """
template <class F> struct signature;
template <class R, class... P> struct signature<R(P...)> {
  template <int I, class H, class... T> struct nth {
    typedef typename nth<I - 1, T...>::type type;
  };
  template <class H, class... T> struct nth<0, H, T...> { typedef H type; };
  template <int I> using at = typename nth<I, P...>::type;
};
template <class T> struct argument;
"""
PRELUDE = (
    f"""
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
namespace msl_launch {{{SIGNATURE}"""
    + """\
template <class T> struct argument<T*> {
  static T* of(ulong address) { return (T*)address; }
  static constexpr uint bytes() { return sizeof(T); }
};
template <class T> struct argument<T&> {
  static T& of(ulong address) { return *(T*)address; }
  static constexpr uint bytes() { return sizeof(T) | 0x80000000u; }
};
template <class T> struct builtin { static T of(__global const uint* v) { return T(v[0]); } };
template <class E> struct builtin<metal::vec<E, 2>> {
  static metal::vec<E, 2> of(__global const uint* v) {
    metal::vec<E, 2> r; r.x = E(v[0]); r.y = E(v[1]); return r;
  }
};
template <class E> struct builtin<metal::vec<E, 3>> {
  static metal::vec<E, 3> of(__global const uint* v) {
    metal::vec<E, 3> r; r.x = E(v[0]); r.y = E(v[1]); r.z = E(v[2]); return r;
  }
};
}
"""
)


def launcher(expression: str, signature: list[Parameter], number: int) -> str:
    """Text of `msl_entry_N`, and of `msl_sizes_N`: bytes of one element of each buffer.

    The top bit of a size says that the buffer is a reference, so exactly that long.
    """
    kinds = f"msl_launch::signature<decltype({expression})>"
    arguments, sizes = [], []
    for i, p in enumerate(signature):
        kind = f"{kinds}::at<{i}>"
        if p.kind == "buffer":
            arguments.append(f"msl_launch::argument<{kind}>::of(buffers[{p.slot}])")
            sizes.append(f"msl_launch::argument<{kind}>::bytes()")
        elif p.kind == "threadgroup":
            arguments.append(f"msl_launch::argument<{kind}>::of(memory[{p.slot}])")
        elif p.kind == "builtin":
            arguments.append(f"msl_launch::builtin<{kind}>::of(context + {3 * p.slot})")
        else:
            raise UnboundParameter(f"kernel {expression}: no attribute binds `{p.text}`")
    return (
        f'extern "C" void msl_entry_{number}(__global const ulong* buffers, '
        f"__global const ulong* memory, __global const uint* context) "
        f"{{ {expression}({', '.join(arguments)}); }}\n"
        f'extern "C" {{ extern __constant const uint msl_sizes_{number}[]; '
        f"__constant const uint msl_sizes_{number}[] = {{{', '.join([*sizes, '0'])}}}; }}\n"
    )
