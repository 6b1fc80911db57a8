"""
python tests/fsdp2.py TRAINER ARGUMENTS, in configs/accelerate/fsdp2.yaml's environment: Accelerate itself
takes DDP on CPUs without a word. Here it is told that this is FSDP.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

begin = AcceleratorState.__init__


def on_cpu(self, *args, fsdp_plugin=None, **options):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = on_cpu
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
