# Versions: torch 2.13.0
# Guess: h[mask] = values, with values that need a gradient, breaks the graph under torch.compile and runs. A function
#   of torch.compiler.allow_in_graph in the same frame changes nothing about that, and fullgraph=True allows less.
# Seen: the break is Dynamo's answer to an error of the backend: the backward has a size that only data say. With
#   one function of allow_in_graph in the frame Dynamo does not answer, and the error reaches the user.
# Matters: whoever puts a function of allow_in_graph into a model: code beside it that compiled stops compiling.
# adaptc: its own such functions do not count, so that the frame breaks as without them, and a user's is named in the
#   error (adaptc/capture/backend.py; tests/runtime/test_values_from_data.py, test_sizes_that_only_data_say,
#   test_beside_a_users_own_function_in_the_graph_the_error_names_it).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 <<'PROGRAM' | seen "plain, fullgraph=False: runs
plain, fullgraph=True: runs
allowed, fullgraph=False: BackendCompilerFailed
allowed, fullgraph=True: runs"
import torch


def plain(t):
    return t * 1


@torch.compiler.allow_in_graph
def allowed(t):
    return t * 1


def fill(function, h, mask, values):
    h = h.clone()
    h[mask] = function(values)
    return h.sum()


h, mask = torch.zeros(4, 3), torch.tensor([True, False, True, False])
values = torch.ones(2, 3, requires_grad=True)
for function in (plain, allowed):
    for whole in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(fill, backend="aot_eager", fullgraph=whole)
        try:
            compiled(function, h, mask, values).backward()
            said = "runs"
        except Exception as error:
            said = type(error).__name__
        print(f"{function.__name__}, fullgraph={whole}: {said}")
PROGRAM
