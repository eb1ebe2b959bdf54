"""Does a model fit on devices that one has not rented yet, how fast could it be, on which mesh?

Meshes are ranked by arithmetic (bounds.py); the best ones are then compiled for the devices
(programs.py), which needs libtpu or jax's CUDA plugin but none of the hardware. Without the
compiler the arithmetic answers alone, and says so.
"""

import dataclasses
import math
from collections.abc import Callable

from gptoss_jax import bounds, sharding
from gptoss_jax.bounds import Work
from gptoss_jax.config import GptOssConfig
from gptoss_jax.engine import CHUNKS
from gptoss_jax.errors import GptOssError
from gptoss_jax.ops.attention import QUERY_BLOCK, SCORES_LIMIT
from gptoss_jax.plan import hardware, programs
from gptoss_jax.plan.hardware import Topology
from gptoss_jax.plan.programs import DoesNotFit, Program, Training

TRIED = 1  # meshes compiled where none is given
LOGITS_BYTES = 1 << 27  # float32 logits that training holds at once


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
      least: Step ("decode" and "prefill", or "train") -> its least work.
      tokens: Step -> tokens a second that the devices' bandwidth, matrix rate and links allow at
        most, all rows together.
      programs: Step -> compiled program; empty if none was compiled.
      needed: What the compiler says a program needs that did not fit, or None.
    """

    mesh: dict[str, int]
    memory: Memory
    least: dict[str, Work]
    tokens: dict[str, float]
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    needed: float | None = None

    @property
    def fits(self) -> bool:
        """Whether all of it fits into the device's memory."""
        return self.needed is None and self.memory.peak <= self.memory.available

    @property
    def pace(self) -> float:
        """Tokens a second of the step that meshes are ranked by."""
        return next(iter(self.tokens.values()))


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
    training: Training | None = None,
    tried: int = TRIED,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans generation, or training.

    Args:
      config: The model.
      topology: "v6e:2x2", "v5p:2x2x1", "h100:8".
      context: Tokens a row, prompt and answer; by default the model's longest. For training the
        length of a row, by default 2,048.
      batch: Rows; for training those computed at once.
      mesh: The mesh to judge; by default the sensible ones, of which the best are compiled.
      packed: Experts in MXFP4, as released; else bfloat16.
      training: What is trained and how; None plans generation.
      tried: How many meshes are compiled, the best by arithmetic first; by default 1.
      say: Told what is being done.

    Raises:
      GptOssError: The topology is unknown, the mesh does not fit model or devices, the context is
        longer than the model's.
    """
    slice_ = hardware.parse(topology)
    if context is None:
        context = config.max_context if training is None else 2048
    if not 0 < context <= config.max_context:
        raise GptOssError(f"context of {context}: this model's is 1 to {config.max_context}")
    if batch < 1:
        raise GptOssError(f"batch of {batch}: expected 1 or more")
    judge = _Judge(config, slice_, packed, training)
    meshes = judge.meshes(slice_.count) if mesh is None else [_given(mesh, config, slice_)]
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


def meshes_for(config: GptOssConfig, count: int, fsdp: bool = False) -> list[dict[str, int]]:
    """Every division of the devices over data, expert and tensor (and fsdp) that the model
    allows.
    """
    axes = ("tensor", "expert", "fsdp", "data") if fsdp else ("tensor", "expert", "data")
    found = []
    for parts in _factors(count, len(axes)):
        sizes = {axis: size for axis, size in zip(axes, parts, strict=True) if size > 1}
        try:
            sharding.check(sizes, config)
        except GptOssError:
            continue
        found.append(sizes)
    return found


def _factors(count: int, parts: int):
    if parts == 1:
        yield (count,)
        return
    for first in range(1, count + 1):
        if count % first == 0:
            yield from ((first, *rest) for rest in _factors(count // first, parts - 1))


def _given(mesh: sharding.Sizes, config: GptOssConfig, topology: Topology) -> dict[str, int]:
    sizes = sharding.sizes_of(mesh)
    sharding.check(sizes, config)
    sharding.check_count(sizes, topology.count, topology.name)
    return {axis: size for axis, size in sizes.items() if size > 1}


def _version(platform: str) -> str:
    import importlib.metadata

    import jax

    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}[platform]
    return f"{package} {importlib.metadata.version(package)}, jax {jax.__version__}"


def _merit(one: Candidate):
    # what fits first; then speed, in steps of 2 % so that of equals the simpler mesh is taken
    pace = math.log(max(one.pace, 1e-9)) // math.log(1.02)
    return not one.fits, -pace if one.fits else one.memory.peak, len(one.mesh), -one.pace


class _Judge:
    """Judges meshes for one model on one kind of devices."""

    def __init__(
        self, config: GptOssConfig, topology: Topology, packed: bool, training: Training | None
    ):
        self.config, self.topology, self.packed = config, topology, packed
        self.device, self.training = topology.device, training
        self.steps = ("decode", "prefill") if training is None else ("train",)

    def meshes(self, count: int) -> list[dict[str, int]]:
        return meshes_for(self.config, count, fsdp=self.training is not None)

    def rank(self, meshes: list[dict[str, int]], batch: int, context: int) -> list[Candidate]:
        return sorted((self.estimate(mesh, batch, context) for mesh in meshes), key=_merit)

    def estimate(self, sizes: dict[str, int], batch: int, context: int) -> Candidate:
        """By arithmetic alone."""
        rows, tensor = bounds.rows_of(batch, sizes), sizes.get("tensor", 1)
        held = bounds.weights(self.config, sizes, self.packed).total
        chunk = min(CHUNKS[-1], context) if self.training is None else context
        # scores in float32 and once more as probabilities
        scores = rows * self.config.num_heads // tensor * chunk * context
        if scores > SCORES_LIMIT:
            scores = scores * min(QUERY_BLOCK, chunk) // chunk
        pairs = rows * chunk * self.config.experts_per_token
        D, F = self.config.hidden_size, self.config.intermediate_size
        if self.training is None:
            cache = bounds.cache(self.config, sizes, batch, context)
            rest = rows * self.config.vocab_size * (4 + 4 + 1) // tensor
            temporaries = 6 * scores + batch // rows * pairs * D * 8
        else:
            cache = 0
            # parameters and two moments in float32, cut like the weights; gradients come and go
            cut = max(1, bounds.weights(self.config, {}, self.packed).total // held)
            rest = self.training.parameters * 12 // cut
            temporaries = self.training.parameters * 4 // cut + 10 * scores
            temporaries += 2 * pairs * (6 * D + 8 * F) + 3 * LOGITS_BYTES
            temporaries += self.config.num_layers * rows * chunk * D * 2  # layers' inputs
        memory = Memory(held, cache, rest, temporaries, 200_000_000, int(self.device.memory))
        return self._paced(Candidate(sizes, memory, {}, {}), batch, context)

    def _paced(self, one: Candidate, batch: int, context: int) -> Candidate:
        least, tokens = {}, {}
        for name in self.steps:
            new = {"decode": 1, "prefill": min(CHUNKS[-1], context), "train": context}[name]
            # an average chunk of the prompt has half of it before it
            end = {"decode": context, "prefill": max(new, context // 2), "train": context}[name]
            work = bounds.step(self.config, one.mesh, batch, new, end, self.packed)
            if name == "train":  # forward, forward again, and the gradient of what came in
                work = Work(3 * work.bytes, 3 * work.flops)
            seconds = work.seconds(self.device)
            sent = one.programs[name].collectives if name in one.programs else None
            if sent:
                seconds += sum(row["bytes"] for row in sent.values()) / self.device.link
            least[name], tokens[name] = work, batch * new / seconds
        return dataclasses.replace(one, least=least, tokens=tokens)

    def compile(self, one: Candidate, batch: int, context: int, devices, say) -> Candidate:
        """The same mesh with the compiler's account of it."""
        known = one.memory.weights + one.memory.cache
        if known > one.memory.available:
            return one  # no compiler is needed to see it
        room = one.memory.available
        steps = programs.Steps(self.config, one.mesh, devices, self.packed, room=room)
        found: dict[str, Program] = {}
        try:
            for name in self.steps:
                say(f"{_text(one.mesh)}: compiling {name}")
                if self.training is None:
                    found[name] = getattr(steps, name)(batch, context)
                else:
                    found[name] = steps.train(self.training, batch, context)
        except DoesNotFit as error:
            needed = error.needed or math.inf
            return dataclasses.replace(one, programs=found, needed=needed)
        memory = dataclasses.replace(
            one.memory,
            rest=found[self.steps[0]].arguments - known,
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
            meshes = self.meshes(1 << power)
            if any(one.fits for one in (self.estimate(m, batch, context) for m in meshes)):
                return 1 << power
        return None


def _text(sizes: dict[str, int]) -> str:
    return sharding.as_text(sizes) or "one device"
