# Versions: torch 2.14.1
# Guess: graph.call_function(MyFunction.apply, (x,)) makes a graph that runs, as it does with any Python function.
# Seen: apply of an autograd Function is a builtin method that belongs to no module. fx, which writes the call as Python
#   code, looks for its module and does not find one. In torch 2.13.0 the GraphModule can be made, but its code calls
#   torch.autograd.function.apply, which there is not: there only fx.Interpreter runs it.
# Matters: passes over fx graphs that put an autograd Function in, and interpret the graph, which worked until 2.13.
# adaptc: a function of that Function's module is put in (printable, adaptc/torch_internals/values.py; the
#   default tests run beside torch 2.14.1 by tests/releases/test_environments.py).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.14.1 <<'PROGRAM' | seen "a function of the Function's module: 6.0
Double.apply: RuntimeError: cannot find module for <built-in method apply"
import torch


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def double(x):
    return Double.apply(x)


for name, target in (("a function of the Function's module", double), ("Double.apply", Double.apply)):
    graph = torch.fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"),)))
    try:
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        print(f"{name}:", module(torch.tensor(3.0)).item())
    except Exception as error:
        print(f"{name}: {type(error).__name__}:", str(error).partition(" of ")[0])
PROGRAM
