"""Small kernels in PTX for the tests of the executor."""

import torch

from .counters import Counters
from .launch import execute
from .machine import Code
from .ptx import parse

_KERNEL = """
.version 8.8
.target sm_80
.extern .shared .align 16 .b8 smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
  .reg .pred %p<16>;
  .reg .b16 %h<64>;
  .reg .b32 %r<64>;
  .reg .b64 %d<64>;
  .loc 1 1 0
  {loads}
  mov.u32 %r0, %tid.x;
{body}
  ret;
}}
  .file 1 "snippet.py"
"""


def run(body: str, *tensors: torch.Tensor, threads: int = 64, programs: int = 1, shared: int = 4096) -> Counters:
    """Run a kernel on tensors, whose addresses are in %d0, %d1, ...; %r0 is the number of the thread.

    A line of the body is one line of the source, from 2 on.
    """
    names = [f"t{i}" for i in range(len(tensors))]
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 snippet_{name}" for name in names)
    loads = " ".join(f"ld.param.b64 %d{i}, [snippet_{name}];" for i, name in enumerate(names))
    lines = "\n".join(
        f"  .loc 1 {number} 1\n  {line}" for number, line in enumerate(body.strip().splitlines(), start=2)
    )
    code = Code(parse(_KERNEL.format(parameters=parameters, threads=threads, loads=loads, body=lines)))
    counters = Counters()
    execute(code, dict(zip(names, tensors, strict=True)), (programs, 1, 1), shared, counters)
    return counters
