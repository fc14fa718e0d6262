"""Teachers: dense models that run beside training and hand out pre-head hidden states.

``base`` says what a teacher is, ``sources`` which kinds there are, ``loading`` checks and loads one
of any kind.
"""

from typing import Any

__all__ = ["StudentTokenizer", "Teacher", "TeacherInfo", "check_teacher", "load_teacher"]


def __getattr__(name: str) -> Any:
    """The room's names need torch, which what only reads recipes does without."""
    if name in __all__:
        from megatron_moe_inject.teachers import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
