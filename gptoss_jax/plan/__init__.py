"""Does a model fit on devices that one has not rented yet, how fast could it be, on which mesh?

Meshes are ranked by arithmetic (bounds.py); the best ones are then compiled for the devices
(programs.py), which needs libtpu or jax's CUDA plugin but none of the hardware. Without the
compiler the arithmetic answers alone, and says so.
"""

import dataclasses
import math
from collections.abc import Callable

from gptoss_jax import sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.engine import CHUNKS
from gptoss_jax.errors import GptOssError
from gptoss_jax.ops.attention import QUERY_BLOCK, SCORES_LIMIT
from gptoss_jax.plan import bounds, hardware, programs
from gptoss_jax.plan.bounds import Work
from gptoss_jax.plan.hardware import Topology
from gptoss_jax.plan.programs import DoesNotFit, Program

TRIED = 2  # meshes compiled where none is given


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment.

    Attributes:
      weights: Parameters.
      cache: Keys and values.
      rest: Sampling state, logits, and what the device's layouts pad.
      temporaries: Of the step that needs most.
      code: Of the compiled steps.
      available: What the device has.
    """

    weights: int
    cache: int
    rest: int
    temporaries: int
    code: int
    available: int

    @property
    def peak(self) -> int:
        """All together."""
        return self.weights + self.cache + self.rest + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh, judged.

    Attributes:
      mesh: Axis -> size; {} for one device.
      memory: By the compiler, or estimated where `programs` is empty.
      decode, prefill: Least work of a step.
      decode_tokens, prefill_tokens: Tokens a second that the devices' bandwidth, matrix rate and
        links allow at most, all rows together.
      programs: Name -> compiled step; empty if none was compiled.
      needed: What the compiler says a program needs that did not fit, or None.
    """

    mesh: dict[str, int]
    memory: Memory
    decode: Work
    prefill: Work
    decode_tokens: float
    prefill_tokens: float
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    needed: float | None = None

    @property
    def fits(self) -> bool:
        """Whether all of it fits into the device's memory."""
        return self.needed is None and self.memory.peak <= self.memory.available


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
      topology: The devices.
      batch, context: As asked.
      best: The mesh to use.
      tried: All meshes, best first.
      compiler: What compiled, or why nothing was compiled.
      largest_context: Most tokens of a context that fit with this batch, 0 for none.
      largest_batch: Most rows that fit with this context, 0 for none.
      fewest_devices: Of this kind on which the batch and context fit, by arithmetic.
    """

    topology: Topology
    batch: int
    context: int
    best: Candidate
    tried: list[Candidate]
    compiler: str
    largest_context: int
    largest_batch: int
    fewest_devices: int | None


def plan(
    config: GptOssConfig,
    topology: str,
    *,
    context: int | None = None,
    batch: int = 1,
    mesh: sharding.Sizes | None = None,
    packed: bool = True,
    tried: int = TRIED,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans generation.

    Args:
      config: The model.
      topology: "v6e:2x2", "v5p:2x2x1", "h100:8".
      context: Tokens a row, prompt and answer; by default the model's longest.
      batch: Rows.
      mesh: The mesh to judge; by default the sensible ones, of which the best are compiled.
      packed: Experts in MXFP4, as released; else bfloat16.
      tried: How many meshes are compiled.
      say: Told what is being done.

    Raises:
      GptOssError: The topology is unknown, the mesh does not fit model or devices, the context is
        longer than the model's.
    """
    slice_ = hardware.parse(topology)
    context = config.max_context if context is None else context
    if not 0 < context <= config.max_context:
        raise GptOssError(f"context of {context}: this model's is 1 to {config.max_context}")
    if batch < 1:
        raise GptOssError(f"batch of {batch}: expected 1 or more")
    judge = _Judge(config, slice_, packed)
    meshes = meshes_for(config, slice_.count) if mesh is None else [_given(mesh, config, slice_)]
    ranked = judge.rank(meshes, batch, context)
    try:
        devices = programs.devices(slice_)
        compiler = _version(slice_.device.platform)
    except ModuleNotFoundError:
        extra = {"tpu": "plan", "gpu": "cuda"}[slice_.device.platform]
        devices = None
        compiler = f"not compiled: pip install 'gptoss_jax[{extra}]' brings the compiler"
    if devices is not None:
        say(f"{len(meshes)} mesh{'es' * (len(meshes) > 1)}, compiling for {slice_.name}")
        best = [judge.compile(one, batch, context, devices, say) for one in ranked[:tried]]
        best.sort(key=_merit)
        ranked = best + ranked[len(best) :]
    return Plan(
        slice_,
        batch,
        context,
        ranked[0],
        ranked,
        compiler,
        judge.largest(ranked[0], lambda n: (batch, n), config.max_context, batch, context),
        judge.largest(ranked[0], lambda n: (n, context), 1 << 16, batch, context),
        judge.fewest(batch, context),
    )


def meshes_for(config: GptOssConfig, count: int) -> list[dict[str, int]]:
    """Every division of the devices over data, expert and tensor that the model allows."""
    found = []
    for tensor in range(1, count + 1):
        for expert in range(1, count // tensor + 1):
            if count % (tensor * expert) == 0:
                sizes = {"data": count // (tensor * expert), "expert": expert, "tensor": tensor}
                sizes = {axis: size for axis, size in sizes.items() if size > 1}
                try:
                    sharding.check(sizes, config)
                except GptOssError:
                    continue
                found.append(sizes)
    return found


def _given(mesh, config: GptOssConfig, topology: Topology) -> dict[str, int]:
    sizes = sharding.parse(mesh) if isinstance(mesh, str) else dict(getattr(mesh, "shape", mesh))
    sharding.check(sizes, config)
    if math.prod(sizes.values()) != topology.count:
        text = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise GptOssError(
            f"mesh {text} needs {math.prod(sizes.values())} devices, {topology.name} has "
            f"{topology.count}: use sizes whose product is {topology.count}"
        )
    return {axis: size for axis, size in sizes.items() if size > 1}


def _version(platform: str) -> str:
    import importlib.metadata

    import jax

    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}[platform]
    return f"{package} {importlib.metadata.version(package)}, jax {jax.__version__}"


def _merit(one: Candidate):
    # what fits first; then speed, in steps of 2 % so that of equals the simpler mesh is taken
    pace = math.log(max(one.decode_tokens, 1e-9)) // math.log(1.02)
    return not one.fits, -pace if one.fits else one.memory.peak, len(one.mesh), -one.decode_tokens


class _Judge:
    """Judges meshes for one model on one kind of devices."""

    def __init__(self, config: GptOssConfig, topology: Topology, packed: bool):
        self.config, self.topology, self.packed = config, topology, packed
        self.device = topology.device

    def rank(self, meshes: list[dict[str, int]], batch: int, context: int) -> list[Candidate]:
        return sorted((self.estimate(mesh, batch, context) for mesh in meshes), key=_merit)

    def estimate(self, sizes: dict[str, int], batch: int, context: int) -> Candidate:
        """By arithmetic alone."""
        held = bounds.weights(self.config, sizes, self.packed).total
        rows = bounds.rows_of(batch, sizes)
        tensor = sizes.get("tensor", 1)
        state = rows * self.config.vocab_size * (4 + 4 + 1) // tensor
        chunk = min(CHUNKS[-1], context)
        # prefill's scores, in float32 and once more as probabilities, and its float32 activations
        queries = rows * self.config.num_heads // tensor * chunk
        scores = queries * context
        if scores > SCORES_LIMIT:
            scores = scores * min(QUERY_BLOCK, chunk) // chunk
        pairs = batch * chunk * self.config.experts_per_token
        temporaries = 6 * scores + pairs * self.config.hidden_size * 8
        memory = Memory(
            held,
            bounds.cache(self.config, sizes, batch, context),
            state,
            temporaries,
            200_000_000,
            int(self.device.memory),
        )
        return self._paced(Candidate(sizes, memory, Work(0, 0), Work(0, 0), 0, 0), batch, context)

    def _paced(self, one: Candidate, batch: int, context: int) -> Candidate:
        chunk = min(CHUNKS[-1], context)
        decode = bounds.step(self.config, one.mesh, batch, 1, context, self.packed)
        # an average chunk of the prompt has half of it before it
        prefill = bounds.step(
            self.config, one.mesh, batch, chunk, max(chunk, context // 2), self.packed
        )
        paces = []
        for name, work, tokens in (("decode", decode, batch), ("prefill", prefill, batch * chunk)):
            seconds = work.seconds(self.device)
            sent = one.programs[name].collectives if name in one.programs else None
            if sent:
                seconds += sum(row["bytes"] for row in sent.values()) / self.device.link
            paces.append(tokens / seconds)
        return dataclasses.replace(
            one, decode=decode, prefill=prefill, decode_tokens=paces[0], prefill_tokens=paces[1]
        )

    def compile(self, one: Candidate, batch: int, context: int, devices, say) -> Candidate:
        """The same mesh with the compiler's account of it."""
        if one.memory.weights + one.memory.cache > one.memory.available:
            return one  # no compiler is needed to see it
        steps = programs.Steps(self.config, one.mesh, devices, self.packed)
        found: dict[str, Program] = {}
        try:
            for name in ("decode", "prefill"):
                say(f"{_text(one.mesh)}: compiling {name}")
                found[name] = getattr(steps, name)(batch, context)
        except DoesNotFit as error:
            needed = error.needed or math.inf
            return dataclasses.replace(one, programs=found, needed=needed)
        decode = found["decode"]
        memory = dataclasses.replace(
            one.memory,
            rest=decode.arguments - one.memory.weights - one.memory.cache,
            temporaries=max(p.temporaries + p.results for p in found.values()),
            code=sum(p.code for p in found.values()),
        )
        return self._paced(dataclasses.replace(one, programs=found, memory=memory), batch, context)

    def largest(self, one: Candidate, at, most: int, batch: int, context: int) -> int:
        """The largest n for which at(n) = (batch, context) fits on a candidate's mesh, by
        arithmetic set right by what was compiled; 0 for none.
        """
        guess = self.estimate(one.mesh, batch, context).memory
        wrong = one.memory.peak - guess.peak if one.programs and one.needed is None else 0

        def fits(n: int) -> bool:
            memory = self.estimate(one.mesh, *at(n)).memory
            return memory.peak + wrong <= memory.available

        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def fewest(self, batch: int, context: int) -> int | None:
        for power in range(12):
            meshes = meshes_for(self.config, 1 << power)
            if any(one.fits for one in (self.estimate(m, batch, context) for m in meshes)):
                return 1 << power
        return None


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device"
