"""Times Hugging Face transformers' GptOss: random bfloat16 weights at the real sizes.

    python -m gptoss_jax.bench.peer_transformers --config config.json --threads 2

Needs torch and transformers 5. Its experts are bfloat16: it has no MXFP4 on CPUs, and on GPUs only
with kernels that it fetches from the Hub.
"""

import time

from gptoss_jax.bench.peer import options, tell, timed


def main() -> None:
    """Runs it and prints one line of JSON."""
    devices = {"default": "cpu", "choices": ("cpu", "cuda")}
    given = options((__doc__ or "").splitlines()[0], device=devices)
    started = time.perf_counter()
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = GptOssConfig(**given.config)
    config._attn_implementation = "eager"
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(given.device)
    model = GptOssForCausalLM(config).eval()
    prompt = torch.randint(0, config.vocab_size, (given.batch, given.prompt))
    wait = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    load = time.perf_counter() - started
    prefill, steps = [], []
    with torch.inference_mode():

        def read():
            out = model(prompt, use_cache=True, logits_to_keep=1)
            wait()
            return out

        out = read()
        for _ in range(given.repeats):
            seconds, out = timed(read)
            prefill.append(seconds)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        def step():
            out = model(token, past_key_values=cache, use_cache=True)
            chosen = out.logits[:, -1:].argmax(-1)
            wait()
            return chosen

        for _ in range(given.new):
            seconds, token = timed(step)
            steps.append(seconds)
    tell(given, "transformers", ("transformers", "torch"), load, prefill, steps)


if __name__ == "__main__":
    main()
