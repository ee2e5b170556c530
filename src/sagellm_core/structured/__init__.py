"""Structured output: a request's text has the form it asks for, and is complete within its tokens.

`GrammarCompiler` turns a `StructuredOutput` into a `Grammar`; each sequence starts its own `GrammarMatcher`, which says
what may come next, takes in what came, and keeps a shortest completion that still fits. Loaded with the first request
that asks for a form (docs/structured-output.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_core.structured.base import Grammar, GrammarMatcher
    from sagellm_core.structured.compiler import CompileLimits, GrammarCompiler
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {".base": ("Grammar", "GrammarMatcher"), ".compiler": ("CompileLimits", "GrammarCompiler")},
    )

__all__ = ["CompileLimits", "Grammar", "GrammarCompiler", "GrammarMatcher"]
