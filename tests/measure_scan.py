"""README's comparison of layers that are unrolled with layers that are scanned in pairs: seconds to
compile one decode step, and what the compiled step takes.

    python tests/measure_scan.py                       gpt-oss-20b's width on this machine's CPU, 4 layers, timed
    python tests/measure_scan.py --tpu v6e:1x1         all layers, compiled for a TPU that is not there

A scan goes over stacked (sliding, full) pairs of layers. The package unrolls: this program is where
that choice comes from.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax import checkpoint, ops
from gptoss_jax.bench.weights import random_params
from gptoss_jax.bounds import leaves
from gptoss_jax.cache import make_cache
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import Block, _Span, hidden, unembed
from gptoss_jax.ops import backends

CAPACITY, AT = 1024, 512


def unrolled(params, cache, token_B1, *, config):
    x_B1D, cache, _ = hidden(params, token_B1, cache, config=config)
    return unembed(params, x_B1D[:, 0]), cache


def scanned(params, caches, length_B, token_B1, *, config):
    span = _Span(token_B1, None, length_B, config, None, False)
    graphs = [
        nnx.split(
            nnx.eval_shape(lambda i=i: Block(config, i, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
        )[0]
        for i in range(2)
    ]

    def pair(x_B1D, given):
        kept = []
        for graph, layer, stored in zip(graphs, *given, strict=True):
            x_B1D, new, _ = nnx.merge(graph, layer)(x_B1D, span, stored, {}, False)
            kept.append(new)
        return x_B1D, kept

    x_B1D = ops.embed(token_B1, params["embedding"])
    x_B1D, caches = jax.lax.scan(pair, x_B1D, (params["pairs"], caches))
    x_B1D = ops.rms_norm(x_B1D, params["norm"], config.rms_norm_eps)
    return unembed(params, x_B1D[:, 0]), caches, span.length_B


def stacked(params, config):
    """The same parameters with every second layer stacked; `params` is consumed layer by layer."""
    layers = params.pop("layers")
    params["pairs"] = [
        jax.tree.map(
            lambda *x: jnp.stack(x), *[layers.pop(i) for i in range(start, config.num_layers, 2)]
        )
        for start in range(2)
    ]
    return params


def stacked_cache(cache):
    return [(jnp.stack(cache.keys[i::2]), jnp.stack(cache.values[i::2])) for i in range(2)]


def report(name, program, seconds, arguments=None):
    memory = program.memory_analysis()
    line = (
        f"{name:9} compile {seconds:6.1f} s, temporaries {memory.temp_size_in_bytes / 1e6:8,.1f} MB"
    )
    step = None
    if arguments is not None:
        times = []
        for _ in range(8):  # caches are donated: each step gives them to the next
            started = time.perf_counter()
            _, *state = program(arguments[0], *arguments[1:])
            jax.block_until_ready(state)
            times.append(time.perf_counter() - started)
            arguments = (arguments[0], *state, arguments[-1])
        step = statistics.median(times[2:])
        line += f", step {1e3 * step:7.1f} ms"
    print(line, flush=True)
    return {"compile_s": seconds, "temporaries": memory.temp_size_in_bytes, "step_s": step}


def compiled(call, donate, arguments, platforms=None):
    started = time.perf_counter()
    traced = jax.jit(call, donate_argnums=donate).trace(*arguments)
    lowered = traced.lower(lowering_platforms=platforms) if platforms else traced.lower()
    return lowered.compile(), time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tpu", help="a topology of one chip, such as v6e:1x1")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = GptOssConfig.preset(options.model)
    layers = options.layers or (config.num_layers if options.tpu else 4)
    config = dataclasses.replace(config, num_layers=layers, layer_types=())
    calls = {f.__name__: functools.partial(f, config=config) for f in (unrolled, scanned)}
    found = {}
    if options.tpu:
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        topology = topologies.get_topology_desc(platform="tpu", topology_name=options.tpu)
        where = SingleDeviceSharding(topology.devices[0])
        flat = {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, _, shape, dtype in leaves(config, True)
        }
        cache = jax.eval_shape(lambda: make_cache(config, 1, CAPACITY))
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        whole = jax.eval_shape(lambda p: stacked(p, config), checkpoint.tree(flat))
        caches = jax.eval_shape(stacked_cache, cache)
        given = {
            "unrolled": (checkpoint.tree(flat), cache, token),
            "scanned": (whole, caches, cache.length_B, token),
        }
        for name, call in calls.items():
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), given[name]
            )
            with backends.compiling_for("tpu"):
                found[name] = report(name, *compiled(call, (1,), arguments, ("tpu",)))
    else:
        params = random_params(config)
        cache = make_cache(config, 1, CAPACITY)
        cache = dataclasses.replace(cache, length_B=jnp.full(1, AT, jnp.int32))
        token = jnp.full((1, 1), 7, jnp.int32)
        caches, length = stacked_cache(cache), jnp.array(cache.length_B)
        arguments = (params, cache, token)
        program = compiled(calls["unrolled"], (1,), arguments)
        found["unrolled"] = report("unrolled", *program, arguments)
        arguments = (stacked(params, config), caches, length, token)
        program = compiled(calls["scanned"], (1,), arguments)
        found["scanned"] = report("scanned", *program, arguments)
    print(json.dumps({"model": options.model, "layers": layers, "tpu": options.tpu, **found}))


if __name__ == "__main__":
    main()
