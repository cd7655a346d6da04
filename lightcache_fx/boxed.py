"""Generated code that takes its arguments as one list and empties it, so that an argument dies after its last use.

The calling convention of torch's own compiled functions ("boxed"); `fx` has such a generator of its own only in recent
versions, and under a private name.
"""

from __future__ import annotations

from typing import Any

from torch.fx.graph import CodeGen


class BoxedCodeGen(CodeGen):
    """`def forward(self, arguments)` in the place of `def forward(self, x, y)`."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The head of the function: names for the list's entries, and the list emptied."""
        names = [variable.partition(":")[0].partition("=")[0].strip() for variable in free_vars]
        taken = ", ".join(name for name in names if name != "self")
        head = f"def forward(self, arguments){maybe_return_annotation}:"
        return f"{head}\n    {taken}, = arguments\n    arguments.clear()" if taken else head
