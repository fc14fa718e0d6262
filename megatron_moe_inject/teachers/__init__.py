"""Teachers: dense models that run beside training and hand out pre-head hidden states.

``base`` says what a teacher is, ``sources`` which kinds there are, ``loading`` checks and loads one
of any kind.
"""

from typing import TYPE_CHECKING

from megatron_moe_inject.host.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_moe_inject.teachers.loading import (
        StudentTokenizer,
        Teacher,
        TeacherInfo,
        check_teacher,
        load_teacher,
    )
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "loading": (
                "StudentTokenizer", "Teacher", "TeacherInfo", "check_teacher", "load_teacher",
            )
        },
    )  # fmt: skip

__all__ = ["StudentTokenizer", "Teacher", "TeacherInfo", "check_teacher", "load_teacher"]
