"""Builds a Ray Serve LLM application with expert offloading: replicas of one engine behind one OpenAI endpoint.

serve run examples.ray_serve_app:build model=MODEL adapmoe_config='{"cache_gb": 8}'

For what replicas share, scaling and the Ray executor see examples/ray_serve.md.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, Json
from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServingArgs, build_openai_app

from vllm_adapmoe.config import AdapMoEConfig

ROUTER = {
    # Requests with a common prefix go to the replica that has it in its KV cache, and its experts in slots.
    "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
    # Unless that replica has this many more requests than another; then the less busy of two is chosen.
    "request_router_kwargs": {"imbalanced_threshold": 4, "do_eviction": True},
}


class Arguments(BaseModel):
    """Arguments that `serve run` takes as `key=value`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Checkpoint folder, or name on the Hub."""
    name: str = "model"
    """Model name for clients."""
    replicas: int = Field(2, ge=1)
    gpus: int = Field(0, ge=0)
    """GPUs per replica; 0: on the CPU."""
    cpus: int = Field(1, ge=1)
    """Cores per replica on the CPU: reserved in Ray, and used as kernel threads."""
    adapmoe_config: str = "{}"
    """Expert cache settings, as JSON or a JSON file."""
    engine_kwargs: Json[dict] = {}
    """Further engine arguments, as JSON."""


def engine(args: Arguments) -> LLMConfig:
    """Configures the deployment of `replicas` engines."""
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model  # replicas run elsewhere
    if args.gpus:
        # Ray Serve LLM runs the workers of an engine with GPUs by vLLM's Ray executor, on one host or on several.
        hardware = {"runtime_env": {}, "placement_group_config": {"bundle_per_worker": {"GPU": 1}}}
    else:
        # vLLM would bind the threads of every replica to the same cores.
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.cpus)}
        hardware = {"runtime_env": {"env_vars": threads}, "placement_group_config": {"bundles": [{"CPU": args.cpus}]}}
    return LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": model},
        engine_kwargs={
            "moe_method": "adapmoe",
            # With `store: host` every replica has a copy of all experts; replicas on one host share the packed file.
            "adapmoe_config": {"store": "file"} | AdapMoEConfig.parse(args.adapmoe_config).transport(),
            "tensor_parallel_size": max(args.gpus, 1),
            **args.engine_kwargs,
        },
        deployment_config={
            "num_replicas": args.replicas,
            "ray_actor_options": {"num_cpus": 0},  # the bundle has what the engine needs
            "request_router_config": ROUTER,
            "health_check_period_s": 1,  # three failures, and a replica whose engine has died is replaced
        },
        **hardware,
    )


def build(args: Arguments) -> Application:
    """Builds the engines and the OpenAI endpoint in front of them."""
    endpoint = {"ray_actor_options": {"num_cpus": 0}}
    return build_openai_app(LLMServingArgs(llm_configs=[engine(args)], ingress_deployment_config=endpoint))
