"""Extra resident memory of one CPU candidate, measured in this process, which must be fresh.

    python -m bench.cpu_memory masked_lora "ours, random 10 %"
    python -m bench.cpu_memory selection fade_kernels [--values N]
    python -m bench.cpu_memory saliency streamed [--divide-tokens N]

Prints the growth in bytes as JSON. The tables of `python -m bench --device cpu` run it once for each candidate.
"""

import argparse
import json

import torch

from bench import saliency, selection
from bench.cpu_tables import MASKS, MEMORY_LAYER, PROVIDERS
from bench.harness import peak_memory
from bench.masked_layer import MaskedLayer
from bench.shapes import Linear


def masked_lora(provider: str) -> int:
    """One training step of `MEMORY_LAYER`."""
    layer = MaskedLayer(MEMORY_LAYER, MASKS)
    small = MaskedLayer(Linear(8, 32, 32, bias=False, count=1), MASKS)
    small.training(PROVIDERS[provider])  # what libraries keep from their first call on is not the layer's
    with peak_memory() as peak:
        layer.training(PROVIDERS[provider])
    return peak.extra


def select(method: str, values: int) -> int:
    """One selection; the packed masks count."""
    tensors = selection.saliency(values)
    selection.METHODS[method]([torch.rand(64, 64)], selection.MEMORY_KEEP)
    with peak_memory() as peak:
        kept = selection.METHODS[method](tensors, selection.MEMORY_KEEP)
    del kept
    return peak.extra


def saliency_pass(form: str, divide_tokens: int) -> int:
    """One pass, accumulators included."""
    run = saliency.Pass(divide_tokens)
    with peak_memory() as peak:
        getattr(run, form)()
    return peak.extra


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_memory", description=__doc__.splitlines()[0])
    tables = parser.add_subparsers(dest="table", required=True)
    tables.add_parser("masked_lora").add_argument("candidate", choices=PROVIDERS)
    table = tables.add_parser("selection")
    table.add_argument("candidate", choices=selection.METHODS)
    table.add_argument("--values", type=int, default=selection.VALUES)
    table = tables.add_parser("saliency")
    table.add_argument("candidate", choices=saliency.FORMS)
    table.add_argument("--divide-tokens", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.table == "masked_lora":
        extra = masked_lora(arguments.candidate)
    elif arguments.table == "selection":
        extra = select(arguments.candidate, arguments.values)
    else:
        extra = saliency_pass(arguments.candidate, arguments.divide_tokens)
    print(json.dumps({"extra_bytes": extra}))


if __name__ == "__main__":
    main()
