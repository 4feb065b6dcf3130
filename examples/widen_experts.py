"""Makes a big mixture-of-experts model from a small one without changing its function.

Every intermediate unit of an expert becomes `factor` equal units, each contributing 1/factor of the output:
rows of the gate and up projections are repeated, columns of the down projection repeated and divided. With a power of
two nothing is rounded, so the big model computes what the small one does and only the bytes of its experts grow. The
copies of an expert follow each other as wholes: quantised in groups, the big model loses what the small one does.

    python examples/widen_experts.py examples/tiny_mixtral/model /tmp/wide --factor 64
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vllm_adapmoe.prefetch.heads import heads_path
from vllm_adapmoe.profile.model_profile import ModelProfile

EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.weight$")
INTO_INTERMEDIATE = {"w1", "w3", "gate_proj", "up_proj"}
OUT_OF_INTERMEDIATE = {"w2", "down_proj"}
SIZE_KEYS = ("moe_intermediate_size", "intermediate_size")
SHARD_BYTES = 2 << 30


def widen(name: str, weight: torch.Tensor, factor: int) -> torch.Tensor:
    """Widens the tensor `name`: unchanged unless it is a projection of a routed expert."""
    match = EXPERT.search(name)
    if match is None:
        return weight
    if match[1] in INTO_INTERMEDIATE:  # [intermediate, hidden]
        return weight.repeat(factor, 1)
    if match[1] in OUT_OF_INTERMEDIATE:  # [hidden, intermediate]
        return weight.repeat(1, factor) / factor
    raise SystemExit(f"{name} is not a projection of an expert that this script knows")


def tensors(model: Path, factor: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and tensors of the big model, one at a time."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, widen(name, file.get_tensor(name), factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the small model")
    parser.add_argument("output", type=Path, help="folder to write the big model to")
    parser.add_argument("--factor", type=int, required=True, help="factor by which experts are widened, a power of two")
    parser.add_argument("--profile", type=Path, help="profile of the small model; written to OUTPUT/profile.json")
    args = parser.parse_args()
    if args.factor < 1 or args.factor & (args.factor - 1):
        raise SystemExit(f"--factor {args.factor} is not a power of two; others would round the weights")

    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.model.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            shutil.copy(path, args.output)
    config = json.loads((args.model / "config.json").read_text())
    key = next(key for key in SIZE_KEYS if key in config)
    config[key] *= args.factor
    (args.output / "config.json").write_text(json.dumps(config, indent=2))

    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, args.output / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    size = 0
    for name, tensor in tqdm(tensors(args.model, args.factor), desc="Widening experts", unit="tensor"):
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES:
            flush()
            size = 0
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (args.output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if args.profile is not None:  # routing and sensitivities are the same; only the checkpoint's hash changes
        from vllm_adapmoe.integration.loading.identity import checkpoint_hash

        profile = ModelProfile.load(args.profile)
        info = profile.model.model_copy(update={"name": args.output.name, "hash": checkpoint_hash(args.output)})
        profile.model_copy(update={"model": info}).save(args.output / "profile.json")
        if profile.heads is not None:
            shutil.copy(heads_path(args.profile), heads_path(args.output / "profile.json"))
    print(f"{args.output}: {total / 2**30:.2f} GiB, {key}={config[key]}")


if __name__ == "__main__":
    main()
