"""User configuration: `additional_config["adapmoe"]`, validated."""

from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_adapmoe.config_merge import BUDGETS, LIMITS, merged
from vllm_adapmoe.files import BadFile, parse_json, read_json
from vllm_adapmoe.printable import OneLineError

CONFIG_BYTES, CONFIG_VALUES = 1 << 20, 1000
"""Maximum bytes and JSON values of a configuration file, which has some twenty keys."""


class AdapMoEError(OneLineError, ValueError):
    """An error the user can fix; the message is one line naming the key, the value and the remedy."""


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path must not contain NUL characters; remove them")
    return text


PathText = Annotated[str, Field(max_length=4096), AfterValidator(_path)]


class GatingConfig(BaseModel):
    """Adaptive top-k. A mode other than `off` takes exactly one of the three limits."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Literal["off", "token", "batch"] = "off"
    """Rule for dropping experts of the router's top-k. `off`: drops none. `token`: each token drops experts
    independently of the batch. `batch`: drops non-resident experts where that costs the whole batch little; outputs
    then depend on the batch and on the cache."""
    threshold: float | None = Field(None, ge=0, strict=True)
    """Maximum loss increase in one layer per token (`batch`: per saved fetch), in nats, in the profile's scale."""
    target_experts: float | None = Field(None, ge=1, strict=True)
    """Target mean number of experts kept per token and layer."""
    max_loss_increase: float | None = Field(None, gt=0, strict=True)
    """Maximum predicted loss increase as a share of the model's mean token loss: 0.005 is half a percent."""

    @model_validator(mode="after")
    def exactly_one_limit(self) -> Self:
        given = [key for key in LIMITS if getattr(self, key) is not None]
        if self.mode == "off" and given:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} has no effect with mode=off; set mode=token")
        if self.mode != "off" and len(given) != 1:
            values = ", ".join(f"{key}={getattr(self, key)}" for key in given) or "none"
            raise ValueError(f"mode={self.mode} takes exactly one of {', '.join(LIMITS)}; given: {values}")
        return self


class PrefetchConfig(BaseModel):
    """Prefetching: experts predicted by the next layers' own gates are loaded before their layer requests them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lookahead: int = Field(3, ge=0, le=8, strict=True)
    """Maximum number of layers ahead to prefetch for; a farther layer is considered only when nothing has to be fetched
    for the nearer ones. 0 disables prefetching."""
    max_experts: int = Field(1, ge=1, strict=True)
    """Maximum number of prefetches in flight; near-certain ones (chance 0.9 or more) do not count."""
    first_layer: bool = Field(True, strict=True)
    """Whether to prefetch the first layer's experts, predicted from the previous token; no effect without a profile
    that has next-token heads."""


class SchedulerConfig(BaseModel):
    """Scheduling by expert use: starts waiting requests later, or in another order, where that saves expert fetches."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(True, strict=True)
    """Whether waiting requests may start later or in another order to save expert fetches; false keeps vLLM's order."""
    max_prefill_delay_ms: float = Field(500.0, ge=0, strict=True)
    """Maximum time a prompt waits for other prompts, to share one pass over the experts, in ms. 0 disables the wait."""
    max_overtakes: float = Field(4.0, ge=0, strict=True)
    """Maximum number of later requests that start before a waiting one because their texts are similar to those that
    run, as a multiple of the running requests. 0 keeps the order of arrival."""


class AdapMoEConfig(BaseModel):
    """Expert cache and gating. At most one cache budget may be set; without any, `cache_gb` is `auto`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cache_gb: Annotated[float, Field(gt=0, le=1e6, strict=True)] | Literal["auto"] = "auto"
    """Memory for expert slots per worker, in GiB. `auto`: the memory that `gpu_memory_utilization` allows, minus
    everything else the worker needs."""
    cache_fraction: float | None = Field(None, gt=0, le=1, strict=True)
    """Number of expert slots as a share of all routed experts of the model."""
    cache_experts: int | None = Field(None, ge=1, le=10**8, strict=True)
    """Number of expert slots in total, over all layers."""
    store: Literal["auto", "host", "file"] = "auto"
    """Backing store, which holds a copy of every expert: `host` memory, or a packed `file` read from disk. `auto`:
    `host` on a GPU, `file` on the CPU."""
    host_gb: float | None = Field(None, gt=0, le=1e6, strict=True)
    """Host memory per worker for the experts of a packed file that are fetched most often, in GiB, page-locked; for a
    GPU, and a model larger than the host's memory. Sets `store` to `file`. Default: none."""
    store_dir: PathText | None = None
    """Folder of the packed files; default: `adapmoe` in vLLM's cache folder."""
    precision: Literal[16, 8, 4, "auto"] = 16
    """Bits per weight of the routed experts. 16: as in the checkpoint. 8, 4: experts of a bf16 checkpoint are
    quantised while they load or are packed, into vLLM's int8 by channel or int4 in groups: half or a third of the
    bytes, at a small increase of the loss, which `adapmoe evaluate --precision` measures. `auto`: the most bits with
    which all experts fit `cache_gb`, else those with which the fewest bytes are fetched, within
    `gating.max_loss_increase` where that is set."""
    eviction: Literal["auto", "lru", "next_use", "next_token"] = "auto"
    """Eviction policy: which resident expert to evict when a slot is needed. `auto`: `next_token` where the profile has
    next-token heads, else `next_use`."""
    allocation: Literal["pool", "uniform", "profile", "trace"] = "pool"
    """Minimum slots per layer protected from eviction. `pool`: none. `uniform`: equal for all layers. `profile`: from
    the profile's routing statistics. `trace`: from the live traffic, revised as it runs."""
    decode: Literal["auto", "device", "host"] = "auto"
    """Where decode steps decide which experts to load and whom to evict. `device`: on the GPU, so that one CUDA graph
    holds a whole step. `host`: in the worker, which reads every layer's routing. `auto`: `device` where all experts are
    in page-locked host memory; on the CPU, `host`."""
    prefetch: PrefetchConfig = Field(default_factory=lambda: PrefetchConfig(**{}))
    link_gbps: float | None = Field(None, ge=1e-6, strict=True)
    """Simulated bandwidth of the link that experts are fetched over, in 1e9 bytes per second: fetches are slowed down
    to it, to study a link that this machine does not have. Default: no limit."""
    trace_out: PathText | None = None
    """File to record the routing of live traffic in, for `adapmoe simulate`."""
    trace_mib: int = Field(256, ge=1, le=1 << 24, strict=True)
    """Size in MiB at which the trace is moved to `trace_out.1` and a new one is started."""
    profile: PathText | None = None
    """Profile of this model: a file written by `adapmoe calibrate`, or the name of one shipped with the plugin, such
    as `mixtral_8x7b`. Needed by gating, `allocation=profile` and `eviction=next_token`."""
    gating: GatingConfig = Field(default_factory=lambda: GatingConfig(**{}))
    scheduler: SchedulerConfig = Field(default_factory=lambda: SchedulerConfig(**{}))

    @model_validator(mode="after")
    def consistent(self) -> Self:
        given = self._budgets()
        if len(given) > 1:
            values = ", ".join(f"{key}={getattr(self, key)}" for key in given)
            raise ValueError(f"{values} are {len(given)} budgets for one cache; set only one of them")
        if self.gating.mode != "off" and self.profile is None:
            raise ValueError(f"gating.mode={self.gating.mode} needs a profile; set profile, see adapmoe calibrate")
        if self.allocation == "profile" and self.profile is None:
            raise ValueError("allocation=profile needs a profile; set profile, see adapmoe calibrate")
        if self.host_gb is not None and self.store == "host":
            raise ValueError(
                f"host_gb={self.host_gb} is for experts of a packed file, and store=host holds all of them; remove one"
            )
        budget = next((key for key in given if key != "cache_gb"), None)
        if self.precision == "auto" and budget is not None:
            raise ValueError(
                f"precision=auto chooses by memory, which {budget}={getattr(self, budget)} does not set; set cache_gb "
                "in its place, or precision"
            )
        if self.decode == "device" and (self.store == "file" or self.host_gb is not None):
            raise ValueError("decode=device copies all experts from host memory; set store=host, without host_gb")
        if self.eviction == "next_token" and self.profile is None:
            raise ValueError("eviction=next_token needs a profile; set profile, see adapmoe calibrate")
        return self

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Validates the user's value: None, a mapping, a JSON object as text, or the path of a JSON file.

        A list of those is merged (`merged`): where several set a key, the last one wins.

        Raises:
            AdapMoEError: unreadable file, malformed JSON, unknown key, wrong type or impossible value.
        """
        if isinstance(value, cls):
            return value
        given = _mapping(value)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise AdapMoEError(_validation_message(error, cls) + _where(value)) from None

    @property
    def automatic(self) -> bool:
        """Whether no budget is set."""
        return not self._budgets()

    @property
    def bits(self) -> int:
        """`precision` as a number; `auto` has been resolved in the front end before anything needs it."""
        assert self.precision != "auto"
        return self.precision

    def _budgets(self) -> list[str]:
        return [key for key in BUDGETS if getattr(self, key) not in (None, "auto")]

    def transport(self) -> dict[str, Any]:
        """Returns the plain JSON form passed to every process in `additional_config["adapmoe"]`."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, list | tuple):
        return reduce(merged, map(_mapping, value), {})
    given = {} if value is None else _read(value) if isinstance(value, str | Path) else value
    if not isinstance(given, dict):
        raise AdapMoEError(
            f"adapmoe_config={_shown(given)} is not a mapping of keys; pass a dict, a JSON object or a file"
        )
    return given


def _where(value: Any) -> str:
    """Returns a suffix naming the file if the value is a single file path, else an empty string."""
    [source] = value if isinstance(value, list | tuple) and len(value) == 1 else [value]
    return f" (in {str(source)!r})" if isinstance(source, str | Path) and not _is_inline(source) else ""


def _is_inline(value: str | Path) -> bool:
    return str(value).lstrip().startswith("{")


def _read(value: str | Path) -> Any:
    text, inline = str(value), _is_inline(value)
    source = "adapmoe_config" if inline else f"adapmoe_config file {text!r}"
    try:
        return parse_json(text, CONFIG_VALUES) if inline else read_json(text, CONFIG_BYTES, CONFIG_VALUES)
    except BadFile as problem:
        unreadable = "cannot be read" in str(problem)
        remedy = "pass a readable JSON file" if unreadable else f"correct the {'text' if inline else 'file'}"
        raise AdapMoEError(f"{source} {problem}; {remedy}") from None


def _validation_message(error: ValidationError, model: type[BaseModel]) -> str:
    errors = error.errors()
    first = errors[0]
    owners: dict[str, type[BaseModel]] = {
        "gating": GatingConfig,
        "prefetch": PrefetchConfig,
        "scheduler": SchedulerConfig,
    }
    # For any other key pydantic appends the alternatives of its type to `loc`, each with its own error.
    alternatives = bool(first["loc"]) and first["loc"][0] not in owners
    key = ".".join(str(part) for part in (first["loc"][:1] if alternatives else first["loc"]))
    if first["type"] == "extra_forbidden":
        owner = owners.get(str(first["loc"][0]), model) if len(first["loc"]) > 1 else model
        return f"adapmoe_config key {key!r} is not known; known keys: {', '.join(owner.model_fields)}"
    if first["type"] == "value_error" and key in ("gating", "prefetch"):
        return f"adapmoe_config {key}: " + first["msg"].removeprefix("Value error, ")
    if not key:
        return "adapmoe_config: " + first["msg"].removeprefix("Value error, ")
    messages = [entry["msg"] for entry in errors if entry is first or (alternatives and entry["loc"][:1] == (key,))]
    messages = [message.removeprefix("Value error, ") for message in messages]
    reasons = " or ".join(message[0].lower() + message[1:] for message in messages)
    return f"adapmoe_config {key}={_shown(first['input'])} is not usable: {reasons}"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        return "(too large to print)"
