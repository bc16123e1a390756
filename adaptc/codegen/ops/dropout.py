"""What the seeded dropout becomes: one pass on a CPU, where generated code would meet its hash in signed words."""

from __future__ import annotations

from adaptc.codegen.cpp import seeded_dropout as cpp
from adaptc.codegen.ops.row import Kernel, Row, on_cpu

ROWS = {
    "seeded_dropout": Row(kernels=(Kernel(cpp.seeded_dropout, cpp.takes, cpp.is_there),), whole=on_cpu),
}
