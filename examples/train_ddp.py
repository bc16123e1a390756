"""Train a tiny model with adapters in several processes, save the adapter, and read it back in one.

Runs offline on the CPU in under a minute::

    torchrun --nproc-per-node 2 examples/train_ddp.py            # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp     # FSDP2: parameters are sharded

The adapters come first: DDP and ``fully_shard`` treat the parameters that they find when they are called.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import adaptc


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    return adaptc.compile(model, adaptc.LoRA(r=4, targets=["q_proj", "v_proj"]), backend="aot_eager")


def wrap(model: LlamaForCausalLM, *, fsdp: bool) -> torch.nn.Module:
    if not fsdp:
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters instead of copying them")
    parser.add_argument("--out", default=None, help="where the adapter goes; default: a directory that is removed")
    options = parser.parse_args()

    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    torch.manual_seed(1)  # the same rows in every process; the sampler deals them out
    rows = torch.randint(3, 64, (32, 12))
    model = make_model()
    wrapped = wrap(model, fsdp=options.fsdp)
    optimizer = torch.optim.AdamW(model.adaptc.parameters(), lr=0.02)  # after wrapping: sharding makes new parameters
    loader = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, shuffle=False))
    for epoch in range(3):
        for batch in loader:
            loss = wrapped(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"epoch {epoch}: loss {mean.item():.4f}")

    with tempfile.TemporaryDirectory() as temporary:
        place = [options.out or temporary]
        dist.broadcast_object_list(place, src=0)
        # All processes call: a sharded adapter is gathered, one process writes, and the others wait for it.
        if options.fsdp or rank == 0:
            model.adaptc.save(place[0])
        if rank == 0:
            again = make_model().eval()
            again.adaptc.load(place[0])
            with torch.no_grad():
                print(f"read back in one process: loss {again(input_ids=rows, labels=rows).loss.item():.4f}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
