"""What the dialect becomes on this machine: kernels, lowerings, costs, and choices by speed.

Whatever is imported of it has the ops run by their kernels.
"""

from adaptc.codegen.ops import registry as registry
