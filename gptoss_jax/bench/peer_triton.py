"""Times OpenAI's own implementation on triton (gpt_oss.triton of the package gpt-oss 0.0.9): random
weights in the released format, decode as a CUDA graph, as its TokenGenerator runs it.

    python -m gptoss_jax.bench.peer_triton --config config.json --threads 2

Needs a Hopper GPU, torch, triton, and triton_kernels of a version that has `matmul_ogs` and
`routing`, as triton 3.4's. Written from its source: it has not run here.
"""

import sys
from typing import Any

from gptoss_jax.bench.peer import options, tell, timed

KERNELS = "git+https://github.com/triton-lang/triton.git@v3.4.0#subdirectory=python/triton_kernels"
INSTALL = f"pip install 'gpt-oss[triton]==0.0.9' pytest '{KERNELS}'"  # its attention imports pytest


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of gpt_oss's ModelConfig for a config.json in Hugging Face's form."""
    same = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit",
        "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window", "rope_theta",
    )  # fmt: skip
    rope = config["rope_scaling"]
    return {name: config[name] for name in same} | {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def fill(model: Any) -> None:
    """Random values in the places that the model made: any byte is two codes in any order."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            parameter.data.random_(0, 256)
        elif "norm" not in name:
            parameter.data.normal_(0, 0.02)
    for block in model.block:
        for scales in (block.mlp.mlp1_weight_mx, block.mlp.mlp2_weight_mx):
            scales.storage.data.random_(118, 122)


def main() -> None:
    """Runs it and prints one line of JSON."""
    given = options((__doc__ or "").splitlines()[0])
    try:
        import torch
        from gpt_oss.torch.model import ModelConfig
        from gpt_oss.triton.model import Cache, Transformer
    except ImportError as problem:
        sys.exit(f"missing: {problem}: {INSTALL}")
    if not torch.cuda.is_available():
        sys.exit("missing: a GPU that torch can use")
    with torch.inference_mode():
        run(given, torch, ModelConfig, Cache, Transformer)


def run(given: Any, torch: Any, ModelConfig: Any, Cache: Any, Transformer: Any) -> None:
    """The measurement, by those modules."""
    torch.manual_seed(0)
    device = torch.device("cuda")

    def build():
        config = ModelConfig(**settings(given.config))
        model = Transformer(config=config, device=device).eval()
        fill(model)
        size = given.batch, given.prompt + given.new, config.num_key_value_heads
        caches = [Cache(*size, config.head_dim, device=device) for _ in model.block]
        torch.cuda.synchronize()
        return config, model, caches

    load, (config, model, caches) = timed(build)
    shape = given.batch, given.prompt
    prompt = torch.randint(0, config.vocab_size, shape, dtype=torch.int32, device=device)
    token = torch.zeros((given.batch, 1), dtype=torch.int32, device=device)

    def read():
        for cache in caches:
            cache.reset()
        model(prompt, caches=caches)
        torch.cuda.synchronize()

    model(token, caches=caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, caches=caches)

    def step():
        graph.replay()
        token.copy_(logits[:, -1:].argmax(-1))
        torch.cuda.synchronize()

    read()
    prefill = [timed(read)[0] for _ in range(given.repeats)]
    step()
    steps = [timed(step)[0] for _ in range(given.new - 1)]
    packages = ("gpt-oss", "triton", "triton-kernels", "torch")
    tell(given, "gpt-oss triton", packages, load, prefill, steps)


if __name__ == "__main__":
    main()
