#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""torch's attention on a GPU at the sizes of `sparge bench --backend cuda`, in JSON of its keys.

    torch_sdpa.py --q-len 32768 --dim 128 --heads 32            flash and cudnn, dense
    torch_sdpa.py --q-len 32768 --sparsity 0.5,0.9              FlexAttention over random masks too

In bf16, on normal numbers; medians of --repeat calls by CUDA events. The last row of the last head
is compared with float64 first. What torch cannot do here is a line on stderr. 77: there is no
torch, or no GPU.
"""
import argparse
import json
import math
import statistics
import sys

BLOCK_Q, BLOCK_K = 128, 64  # of the cuda backend


def flex_attention(torch, inputs, keep):
    """FlexAttention over whole blocks: nothing inside a block is masked."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    count = keep.sum(-1, dtype=torch.int32)
    index = torch.argsort(keep, dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), index, count, index,
                                    BLOCK_SIZE=(BLOCK_Q, BLOCK_K))
    flex = torch.compile(flex_attention, dynamic=False)
    tile = {"BLOCK_M": BLOCK_Q, "BLOCK_N": BLOCK_K}  # its own may be larger than the mask's blocks
    return lambda: flex(*inputs, block_mask=mask, kernel_options=tile)


def sdpa(torch, inputs, backend, causal):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
    return call


def check(torch, inputs, o, keep):
    q, k, v = (x[0, -1].double() for x in inputs)
    s = k @ q[-1] / math.sqrt(q.shape[-1])  # the last row sees every key
    if keep is not None:
        s = s.masked_fill(~keep[0, -1, -1].repeat_interleave(BLOCK_K)[:len(s)].bool(), -math.inf)
    want = torch.softmax(s, 0) @ v
    l1 = float((o[0, -1, -1].double() - want).abs().sum() / want.abs().sum())
    if not l1 <= 0.05:
        raise RuntimeError(f"o is wrong, relative L1 {l1:.3g}")


def seconds(torch, call):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def measure(torch, args, name, inputs, call, keep=None):
    n, dim = args.q_len, args.dim
    try:
        check(torch, inputs, call(), keep)
        time = statistics.median(seconds(torch, call) for _ in range(args.repeat))
    except Exception as e:  # torch has many kinds; the others go on
        print(f"{name}: {str(e).strip().splitlines()[0][:160]}", file=sys.stderr)
        return []
    share = 0.0 if keep is None else 1.0 - float(keep.float().mean())
    pairs = args.heads * (n * (n + 1) // 2 if args.causal else n * n)
    tops = 4e-12 * dim * pairs / max(time, 1e-9)
    return [{"case": name, "mask": "dense" if keep is None else "random", "backend": "torch",
             "kernel": None, "q_len": n, "k_len": n, "dim": dim, "heads": args.heads,
             "causal": "end" if args.causal else "none", "sparsity": share, "seconds_total": time,
             "seconds_attend": time, "tops": tops, "tops_executed": tops * (1 - share)}]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("--q-len", 32768), ("--dim", 128), ("--heads", 32), ("--repeat", 7)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--sparsity", type=lambda x: [float(n) for n in x.split(",")], default=[])
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("torch is not on this machine", file=sys.stderr)
        return 77
    if not torch.cuda.is_available():
        print("torch sees no GPU on this machine", file=sys.stderr)
        return 77
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)
    torch.manual_seed(1)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = [torch.randn((1, args.heads, args.q_len, args.dim), **kind) for _ in "qkv"]
    rows = []
    with torch.no_grad():
        for backend in "FLASH_ATTENTION", "CUDNN_ATTENTION":
            rows += measure(torch, args, f"torch {backend.split('_')[0].lower()} bf16", inputs,
                            sdpa(torch, inputs, backend, args.causal))
        for share in args.sparsity:
            blocks = args.heads, -(-args.q_len // BLOCK_Q), -(-args.q_len // BLOCK_K)
            keep = (torch.rand((1, *blocks), device="cuda") >= share).int()
            rows += measure(torch, args, f"torch flex bf16 random {share:g}", inputs,
                            flex_attention(torch, inputs, keep), keep)
    print(json.dumps(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
