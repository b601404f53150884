"""Triton's interpreter, faster: a test of many helpers spends most of its time in it otherwise."""

from triton import language
from triton.runtime import interpreter


def prepare_once() -> None:
    """Keep the language prepared for interpretation, once it is.

    The interpreter replaces the members of `triton.language` at every launch, and again at every
    call of a helper, by looking through all of them: 1 ms, for helpers that take a tenth of it.
    A process with TRITON_INTERPRET needs the members themselves nowhere. Does nothing where the
    interpreter is built differently.
    """
    prepare = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or scope is None:
        return
    prepared = set()

    def prepare_language(function):
        seen = {id(value) for value in function.__globals__.values()}
        key = id(language) in seen, id(language.core) in seen
        if key not in prepared:
            prepare(function)
            prepared.add(key)
        return scope()

    interpreter._patch_lang = prepare_language
