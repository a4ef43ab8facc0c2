"""The laws that every format, method, task and client keeps, for entries of your own.

    from tersor.testing import check_format
    check_format(MyFormat())

Each function tries an entry on what real models hold, and on much that they had better not, and raises `LawBroken` with
a sentence for the first thing that is wrong. tersor's own tests run the same laws over its tables. No test framework is
needed.
"""

from tersor.testing.exporters import check_exporter
from tersor.testing.formats import check_format
from tersor.testing.law import LawBroken
from tersor.testing.methods import check_method
from tersor.testing.tasks import check_task

__all__ = ["LawBroken", "check_exporter", "check_format", "check_method", "check_task"]
