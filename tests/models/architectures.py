"""Tells which architectures of vLLM's registry build routed experts, by reading vLLM's model code without running it.

A model builds them where it calls `FusedMoEFactory`, itself or through the classes and functions that it names.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
import vllm
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import registry

VLLM = Path(vllm.__file__).parent
TRANSFORMERS = Path(transformers.__file__).parent / "models"
MODELS = "vllm.model_executor.models"
BUILDERS = {"FusedMoEFactory", "RoutedExperts", "MoERunner"}
"""What makes a layer of routed experts; a subclass is found through its base."""
BACKEND = "TransformersMoEForCausalLM"
KINDS = {
    "text": registry._TEXT_GENERATION_MODELS,
    "multimodal": registry._MULTIMODAL_MODELS,
    "embedding": registry._EMBEDDING_MODELS,
    "late interaction": registry._LATE_INTERACTION_MODELS,
    "reward": registry._REWARD_MODELS,
    "token classification": registry._TOKEN_CLASSIFICATION_MODELS,
    "sequence classification": registry._SEQUENCE_CLASSIFICATION_MODELS,
    "draft": registry._SPECULATIVE_DECODING_MODELS,
    "transformers": registry._TRANSFORMERS_SUPPORTED_MODELS,
}


@dataclass(frozen=True)
class Architecture:
    """An architecture as a checkpoint's `config.json` names it."""

    name: str
    kind: str
    """A key of `KINDS`."""
    module: str
    """Where vLLM implements it, dotted."""
    cls: str


@dataclass(frozen=True)
class Module:
    """What a module of vLLM defines, by name, and what its imports from other model code mean."""

    uses: dict[str, frozenset[str]]
    """Names and architectures in quotes that a class or function mentions."""
    imports: dict[str, tuple[str, str]]
    """Local name -> (module, name there)."""


def moe_architectures() -> list[Architecture]:
    """Every architecture that builds routed experts; one name, one entry.

    Those of the installed vLLM's registry, then those of transformers that vLLM has no code for, and runs with
    transformers' own (`TransformersMoEForCausalLM`).
    """
    found: dict[str, Architecture] = {}
    for kind, entries in KINDS.items():
        for name, (module, cls) in entries.items():
            dotted = module if "." in module else f"{MODELS}.{module}"
            if name not in found and builds_experts(dotted, cls):
                found[name] = Architecture(name, kind, dotted, cls)
    for name in transformers_models():
        found.setdefault(name, Architecture(name, "transformers", f"{MODELS}.transformers", BACKEND))
    return list(found.values())


def transformers_models() -> list[str]:
    """Language models of transformers with a class of experts, that vLLM's registry does not name."""
    names = []
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        folder = TRANSFORMERS / model_type_to_module_name(model_type)
        code = "".join(file.read_text() for file in sorted(folder.glob("modeling_*.py")))
        if name not in registry._VLLM_MODELS and ("use_experts_implementation" in code or "Experts(nn.Module" in code):
            names.append(name)
    return names


def builds_experts(module: str, cls: str) -> bool:
    """Whether `cls` reaches one of `BUILDERS`."""
    seen: set[tuple[str, str]] = set()
    waiting = [(module, cls)]
    while waiting:
        place, name = waiting.pop()
        if (place, name) in seen:
            continue
        seen.add((place, name))
        if name in BUILDERS or name == BACKEND:
            return True
        if place.startswith(f"{MODELS}.transformers"):  # one module for models with and without experts
            continue
        code = read_module(place)
        if code is None:
            continue
        if name in code.imports:
            waiting.append(code.imports[name])
        for used in code.uses.get(name, ()):
            if used in code.uses:
                waiting.append((place, used))
            elif used in code.imports:
                waiting.append(code.imports[used])
            elif used in registry._VLLM_MODELS:
                inner, cls = registry._VLLM_MODELS[used]
                waiting.append((inner if "." in inner else f"{MODELS}.{inner}", cls))
    return False


@cache
def read_module(dotted: str) -> Module | None:
    """A module of vLLM's model code; None for any other."""
    if not dotted.startswith((MODELS, "vllm.models")):
        return None
    path = _path(dotted)
    if path is None:
        return None
    uses: dict[str, set[str]] = {}
    imports: dict[str, tuple[str, str]] = {}
    package = dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([node.module] if node.module else []))
            imports |= {alias.asname or alias.name: (base, alias.name) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            uses[node.name] = _names(ast.walk(node))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            uses[node.targets[0].id] = _names(ast.walk(node.value))
    return Module({name: frozenset(used - {name}) for name, used in uses.items()}, imports)


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in registry._VLLM_MODELS:
            names.add(node.value)
    return names


def _path(dotted: str) -> Path | None:
    path = VLLM.joinpath(*dotted.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)
