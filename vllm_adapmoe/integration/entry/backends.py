"""Chooses the vLLM MoE kernel that computes on slots, by the experts' format and the device's compute capability.

Slots need a kernel that takes a map from expert to weight row and skips experts without a row. vLLM's are
`TritonExperts`, `TritonWNA16Experts` and `MarlinExperts`. Which value of `--moe-backend` selects one of them depends on
the format: `triton` means `TritonExperts` for FP8, but a monolithic kernel, which routes by itself, for MXFP4. Taken
from `fused_moe/oracle/*.py` of vLLM 0.30 to 0.33; `docs/backends.md` lists the resulting choices.
"""

from collections.abc import Collection
from dataclasses import dataclass

from vllm_adapmoe.config import AdapMoEError

AUTO = "auto"
ANY = (0, 0)
Capability = tuple[int, int]


@dataclass(frozen=True)
class Format:
    """A storage format of expert weights, as far as it decides which kernels can be used."""

    backends: dict[str, Capability]
    """Values of `moe_backend` that select a kernel with a map, best first, with the minimum capability of each."""
    remedy: str = ""
    """Advice for the error message where no such kernel reads this format."""
    ignored: tuple[Capability, Capability] = (ANY, ANY)
    """Capabilities, from the first to below the second, for which vLLM ignores `moe_backend`."""


UNQUANTISED = "unquantised"
FP8 = "FP8"
FP8_CHANNELS_ONLINE = "FP8 by channel, quantised while loading"
INT8 = "int8"
INT_WEIGHTS = "int4 or int8 weights"
MOE_WNA16 = "int4 or int8 weights as moe_wna16"
MXFP4 = "MXFP4"
MXFP4_W4A4 = "MXFP4 with 4 bit activations"
MXFP4_COMPRESSED = "MXFP4 of compressed-tensors"
MXFP8 = "MXFP8"
NVFP4 = "NVFP4"
W4A8 = "W4A8"
MXFP6 = "MXFP6"
HUMMING = "humming"
BLOCK_CODECS = "block codecs of ModelOpt"

FORMATS = {
    UNQUANTISED: Format({"triton": ANY}),
    # Triton multiplies FP8 by FP8, which needs Ada or later; Marlin widens the weights.
    FP8: Format({"triton": (8, 9), "marlin": (7, 5)}),
    FP8_CHANNELS_ONLINE: Format({"triton": (8, 9)}, "set quantization=fp8_per_block"),
    INT8: Format({"triton": (7, 5)}),
    # `triton` reads some of these as well, but not AWQ, and is slower.
    INT_WEIGHTS: Format({"marlin": (7, 5)}),
    MOE_WNA16: Format({"triton": ANY}),
    MXFP4: Format({"marlin": (7, 5)}),
    MXFP4_W4A4: Format({"marlin": (7, 5)}),  # Marlin leaves activations as they are
    MXFP4_COMPRESSED: Format(
        {"marlin": (7, 5)}, "use an NVFP4 or FP8 checkpoint of this model", ignored=((10, 0), (12, 0))
    ),
    MXFP8: Format({"marlin": (7, 5)}),
    NVFP4: Format({"marlin": (7, 5)}),
    W4A8: Format({}, "use a W4A16 or FP8 checkpoint of this model"),
    MXFP6: Format({}, "use an MXFP4 or FP8 checkpoint of this model"),
    HUMMING: Format({}, "remove quantization=humming"),
    BLOCK_CODECS: Format({}, "use an NVFP4 or FP8 checkpoint of this model"),
}
"""Known expert formats by name; a format without backends cannot be served from slots."""


def choose_backend(formats: Collection[str], capability: Capability | None, requested: str) -> str:
    """Returns the value of `moe_backend` to set.

    Args:
        formats: keys of `FORMATS`; several where the layers of a model differ.
        capability: compute capability of the device; None if not known here.
        wish: `moe_backend` as the user set it, or "auto".

    Raises:
        AdapMoEError: no vLLM kernel computes these formats on slots, or the requested one does not.
    """
    usable = [name for name in _common(formats) if capability is None or _runs(formats, name, capability)]
    if capability is None:  # prefer the backend that runs on the oldest devices
        usable.sort(key=lambda name: _min_capability(formats, name))
    subject = f"experts in {' and '.join(sorted(formats))}"
    if capability is not None:
        subject += f" at compute capability {capability[0]}.{capability[1]}"
    if not usable:
        named = next((FORMATS[name].remedy for name in sorted(formats) if FORMATS[name].remedy), "")
        remedy = named or _capability_remedy(formats)
        raise AdapMoEError(
            f"moe_backend={requested}: vLLM has no kernel that computes {subject} with part of them resident; {remedy}"
        )
    if requested == AUTO:
        return usable[0]
    if requested not in usable:
        alternatives = "".join(f", {name}" for name in usable[1:])
        raise AdapMoEError(
            f"moe_backend={requested} does not compute {subject} with part of them resident; set --moe-backend "
            f"{usable[0]}{alternatives}, or leave it out"
        )
    return requested


def _common(formats: Collection[str]) -> list[str]:
    first, *others = (FORMATS[name].backends for name in sorted(formats))
    return [name for name in first if all(name in backends for backends in others)]


def _runs(formats: Collection[str], backend: str, capability: Capability) -> bool:
    ignored = any(start <= capability < stop for start, stop in (FORMATS[name].ignored for name in formats))
    return _min_capability(formats, backend) <= capability and not ignored


def _min_capability(formats: Collection[str], backend: str) -> Capability:
    return max(FORMATS[name].backends[backend] for name in formats)


def _capability_remedy(formats: Collection[str]) -> str:
    minimums = [_min_capability(formats, backend) for backend in _common(formats)]
    if not minimums:
        return "use a checkpoint with one format for all experts"
    major, minor = min(minimums)
    return f"use a device of compute capability {major}.{minor} or later"
