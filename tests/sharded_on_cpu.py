"""Runs a script on CPUs with FSDP: accelerate launch --config_file FILE sharded_on_cpu.py SCRIPT FLAGS.

FSDP2 works with gloo. accelerate reads its configuration, but takes it up only where there are GPUs.
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__


def initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """What accelerate does itself for processes with GPUs."""
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


os.environ["ACCELERATE_USE_CPU"] = "true"
AcceleratorState.__init__ = initialise_with_fsdp
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
