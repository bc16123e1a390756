# Versions: torch 2.13.0
# Guess: torch.compile runs the forward hooks that a model had before it was compiled; a backward hook elsewhere breaks
#   the graph and costs time, no more.
# Seen: a backward hook on a part of one block, in a loop over blocks: Dynamo leaves the outer frame to Python and
#   compiles the forward of a block, once for all of them. Its guards do not ask for hooks that are not there (a setting
#   of torch, for the sake of time), so that the hook of a later block's part is left out, silently.
# Matters: whoever puts adapters, probes or quantisation into hooks on some blocks and compiles the model.
# adaptc: frames behind a graph break guard on such hooks (adaptc/torch_internals/dynamo.py;
#   tests/runtime/calls/test_watch.py, test_code_behind_a_break_that_modules_share_knows_their_hooks).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 <<'PROGRAM' | seen "forward hook alone: as without torch.compile
backward hook on another block: the forward hook did not run
the same with skip_nnmodule_hook_guards=False: as without torch.compile"
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def run(backward_hook):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4)
    plain = model(x)
    model.blocks[2].linear.register_forward_hook(lambda module, args, output: output * 2)
    if backward_hook:
        model.blocks[0].linear.register_full_backward_hook(lambda module, into, out: None)
    expected, found = model(x), torch.compile(model, backend="eager")(x)
    if torch.allclose(found, expected):
        return "as without torch.compile"
    return "the forward hook did not run" if torch.allclose(found, plain) else "something else"


print("forward hook alone:", run(False))
print("backward hook on another block:", run(True))
with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
    print("the same with skip_nnmodule_hook_guards=False:", run(True))
PROGRAM
